"""Limits on what a phase computes at once. --oom_retry halves them; the results do not depend on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from grpo_ds.settings.config import TrainConfig

SMALLEST_CHUNK_MIB = 4.0


@dataclass(slots=True)
class Limits:
    """Completions sampled at once, tokens of packed rows computed at once, MiB of logits in memory at once.

    Example:
        >>> Limits.of(TrainConfig())
        Limits(rows=8, tokens=3928, chunk_mib=64.0, least_rows=4, least_tokens=1067)
    """

    rows: int
    tokens: int
    chunk_mib: float
    least_rows: int = 1  # a group, whose completions share a prompt
    least_tokens: int = 1  # a prompt with one completion

    @classmethod
    def of(cls, config: TrainConfig) -> "Limits":
        """Return the limits of a run in which nothing has run out of memory."""
        size, generations = config.batch_size, config.num_generations
        whole = size * (config.longest + (generations - 1) * (config.max_completion_length - 1))
        tokens = config.pack_tokens or whole
        return cls(
            rows=config.generation_batch_size or size * generations,
            tokens=tokens,
            chunk_mib=config.logprob_chunk_mib,
            least_rows=generations,
            least_tokens=tokens if config.loss_type == "bnpo" else config.longest,  # bnpo: the split decides the loss
        )

    def lowered(self, config: TrainConfig) -> dict[str, float]:
        """Return the limits that are now smaller than `config` asks for."""
        asked = asdict(Limits.of(config))
        return {name: value for name, value in asdict(self).items() if value != asked[name]}

    def lower_to(self, smaller: Mapping[str, float]) -> None:
        """Use the limits that `lowered` returned in an earlier run."""
        self.rows = min(self.rows, int(smaller.get("rows", self.rows)))
        self.tokens = min(self.tokens, int(smaller.get("tokens", self.tokens)))
        self.chunk_mib = min(self.chunk_mib, smaller.get("chunk_mib", self.chunk_mib))

    def halve(self, phase: str) -> str | None:
        """Halve the limit that makes this phase large and return its description; None if nothing can be halved."""
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
