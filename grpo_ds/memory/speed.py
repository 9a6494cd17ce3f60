"""Seconds of a step on a card, computed from its bandwidth and its FLOPs before anything runs.

Each part of a step takes the time of what limits it, at a share of the card's peak: docs/performance.md has the
formula. The shares are assumptions, not measured on any card. Q questions, G completions each, P prompt tokens,
C completion tokens, N parameters.
"""

import re
from dataclasses import dataclass

from grpo_ds.memory.select import Job

FLOPS_SHARE, BANDWIDTH_SHARE, PCIE_SHARE = 0.4, 0.6, 0.7  # of the peak, in large products, in decoding, in copies
CPU_PARAMETERS = 0.7e9  # per second: AdamW8bit's step in RAM, measured on two cores (docs/performance.md)
OPTIMIZER_BYTES = 20  # per parameter that an optimizer on the card reads and writes
HALF = 2  # bytes of a weight, an activation, a gradient


@dataclass(frozen=True, slots=True)
class Card:
    """A card's peaks, from its data sheet.

    Example:
        >>> card_named("NVIDIA GeForce RTX 3060").gb_per_s
        360
    """

    name: str
    gib: float  # that nvidia-smi shows as its total; less where ECC takes a part
    gb_per_s: float  # memory bandwidth
    tflops: float  # dense products in 16 bits, summed in fp32, by the tensor cores
    pcie: float  # GB/s in one direction
    bf16: bool = True  # else it computes in fp16


# NVIDIA's data sheets: T4, V100, A10, L4, A100 and H100 product pages; appendix A of the Turing, Ampere GA102 and Ada
# white papers for GeForce cards ("Peak FP16 Tensor TFLOPS with FP32 Accumulate", without sparsity). PCIe 3.0, 4.0 and
# 5.0 x16 have 16, 32 and 64 GB/s; an RTX 4060 Ti has 8 lanes.
CARDS = (
    Card("RTX 2060", 6, 336, 25.8, 16, bf16=False),
    Card("RTX 2080", 8, 448, 42.4, 16, bf16=False),
    Card("RTX 3070", 8, 448, 40.6, 32),
    Card("RTX 2080 Ti", 11, 616, 56.9, 16, bf16=False),
    Card("RTX 3060", 12, 360, 25.6, 32),
    Card("RTX 4070", 12, 504, 58.3, 32),
    Card("T4", 15, 320, 65, 16, bf16=False),
    Card("V100", 16, 900, 112, 16, bf16=False),
    Card("RTX 4060 Ti", 16, 288, 44, 16),
    Card("L4", 22.5, 300, 121, 32),
    Card("A10", 22.5, 600, 125, 32),
    Card("RTX 3090", 24, 936, 71, 32),
    Card("RTX 4090", 24, 1008, 165, 32),
    Card("A100 40GB", 40, 1555, 312, 32),
    Card("A100 80GB", 80, 2039, 312, 32),
    Card("H100", 80, 3350, 989, 64),
)
TYPICAL = ("RTX 3070", "RTX 3060", "RTX 4060 Ti", "RTX 3090", "A100 40GB", "H100")  # of each size, the smallest first


def card_named(name: str) -> Card | None:
    """Return the card whose words are all in `name`, as a person or nvidia-smi writes it; None for one not known."""
    words = _words(name)
    found = [card for card in CARDS if _words(card.name) <= words and "laptop" not in words]
    return max(found, key=lambda card: len(card.name), default=None)


def typical_card(gib: float) -> Card:
    """Return a common card with about this much memory: the largest that has no more, else the smallest."""
    cards = [card for card in CARDS if card.name in TYPICAL]
    return max((card for card in cards if card.gib <= gib + 1), key=lambda card: card.gib, default=cards[0])


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of the parts of a step.

    Example:
        >>> StepSeconds(sample=8.6, reference=2.3, update=9.1, step=5.0).total
        25.0
    """

    sample: float
    reference: float
    update: float
    step: float  # of the optimizer, with the gradients' way to RAM and the weights' way back

    @property
    def total(self) -> float:
        return round(self.sample + self.reference + self.update + self.step, 6)


def step_seconds(job: Job, card: Card) -> StepSeconds | None:
    """Compute a step of full length; None if a part of it runs on the CPU, whose speed is not known."""
    shape, config = job.shape, job.config
    if config.beta and config.reference_kind == "bf16-cpu":
        return None
    flops, bandwidth = FLOPS_SHARE * card.tflops * 1e12, BANDWIDTH_SHARE * card.gb_per_s * 1e9
    pcie = PCIE_SHARE * card.pcie * 1e9
    questions, group = config.batch_size, config.num_generations
    prompt, length = config.max_prompt_length, config.max_completion_length
    completions = questions * group
    head = shape.vocab * shape.hidden
    body = sum(rows * columns * count for _, rows, columns, count in shape.linears)

    # Decoding reads all weights and the cache for each token; bitsandbytes writes and reads 16 bits of each layer, too.
    rows = min(completions, config.generation_batch_size or completions)
    weights = shape.base_bytes(config.base_bits, HALF) - (not shape.tied) * head * HALF
    weights += 2 * HALF * body * (config.base_bits < 16)
    cached = 2 * HALF * shape.layers * shape.kv_heads * shape.head_dim  # bytes of a token
    cache = cached * (prompt * -(-rows // group) + rows * length / 2)
    token = max((weights + cache) / bandwidth, 2 * (body + head) * rows / flops)
    sample = 2 * body * questions * prompt / flops + -(-completions // rows) * length * token

    packed = questions * (prompt + group * (length - 1))
    forward = 2 * (body * packed + head * completions * length) / flops
    again = config.gradient_checkpointing is not False
    passes = (2 if config.lora_r else 3) + again  # a frozen weight has no gradient of its own
    streamed = HALF * body / pcie * (config.reference_kind == "streamed")
    reference = max(forward, streamed) * (config.beta > 0)
    trained = shape.lora_parameters(config.lora_r, config.lora_targets) if config.lora_r else shape.parameters
    moved = 2 * HALF * trained / pcie + trained / CPU_PARAMETERS
    step = moved if job.ds.offload else trained * OPTIMIZER_BYTES / bandwidth
    return StepSeconds(sample, reference, passes * forward, step)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
