"""How much a phase computes at once: what --oom_retry makes smaller. Results do not depend on it."""

from dataclasses import dataclass

SMALLEST_CHUNK_MIB = 4.0


@dataclass(slots=True)
class Limits:
    """Prompts sampled at once, questions packed into one forward pass, MiB of logits alive at a time."""

    prompts: int
    groups: int
    chunk_mib: float

    def halve(self, phase: str) -> str | None:
        """Half of what makes that phase large, said in words; None when there is nothing left to halve."""
        if phase == "sample":
            if self.prompts == 1:
                return None
            self.prompts = -(-self.prompts // 2)
            return f"{self.prompts} prompts sampled at once"
        if self.groups > 1:
            self.groups = -(-self.groups // 2)
            return f"{self.groups} questions packed at once (--micro_groups)"
        if self.chunk_mib > SMALLEST_CHUNK_MIB:
            self.chunk_mib /= 2
            return f"{self.chunk_mib:g} MiB of logits at once (--logprob_chunk_mib)"
        return None
