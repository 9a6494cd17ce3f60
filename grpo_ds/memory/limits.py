"""How much a phase computes at once: what --oom_retry makes smaller. Results do not depend on it."""

from dataclasses import asdict, dataclass

from grpo_ds.settings.config import TrainConfig

SMALLEST_CHUNK_MIB = 4.0


@dataclass(slots=True)
class Limits:
    """Completions sampled at once, tokens of packed rows computed at once, MiB of logits alive at a time."""

    rows: int
    tokens: int
    chunk_mib: float
    least_rows: int = 1  # a group's; they share its prompt
    least_tokens: int = 1  # of a prompt with one completion

    @classmethod
    def of(cls, config: TrainConfig) -> "Limits":
        """As long as nothing runs out of memory."""
        size, generations = config.batch_size, config.num_generations
        whole = size * (config.longest + (generations - 1) * (config.max_completion_length - 1))
        return cls(
            rows=config.generation_batch_size or size * generations,
            tokens=config.pack_tokens or whole,
            chunk_mib=config.logprob_chunk_mib,
            least_rows=generations,
            least_tokens=config.longest,
        )

    def halved(self, config: TrainConfig) -> dict[str, float]:
        """What is smaller by now than `config` asks for."""
        asked = asdict(Limits.of(config))
        return {name: value for name, value in asdict(self).items() if value != asked[name]}

    def halve(self, phase: str) -> str | None:
        """Half of what makes that phase large, said in words; None when there is nothing left to halve."""
        if phase == "sample":
            if self.rows <= self.least_rows:
                return None
            self.rows = max(self.least_rows, -(-self.rows // 2))
            return f"{self.rows} completions sampled at once (--generation_batch_size)"
        if self.tokens > self.least_tokens:
            self.tokens = max(self.least_tokens, -(-self.tokens // 2))
            return f"{self.tokens} tokens packed at once (--pack_tokens)"
        if self.chunk_mib > SMALLEST_CHUNK_MIB:
            self.chunk_mib /= 2
            return f"{self.chunk_mib:g} MiB of logits at once (--logprob_chunk_mib)"
        return None
