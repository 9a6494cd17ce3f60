"""Models by short name, and the recipe that suits each: defaults for the flags a person did not type.

Standard library only: the command line needs it before anything heavy is loaded.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Preset:
    """A named model."""

    name: str
    hub_id: str | None  # None: comes from a wheel (models/embedded.py)
    parameters: int
    recipe: dict[str, object] = field(default_factory=dict)  # flag name -> default


EMBEDDED = "smollm2-135m"

# For a laptop: a 135M model keeps to the format only when shown (two worked examples, the opening tag
# prefilled), learns at 20 times a large model's rate, and must not wait for 300 tokens on two cores.
LAPTOP = {
    "few_shot": 2,
    "prefill": True,
    "num_generations": 8,
    "max_prompt_length": 512,
    "max_completion_length": 48,
    "learning_rate": 2e-5,
    "num_steps": 20,
    "eval_limit": 24,
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        Preset("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        Preset("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        Preset("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        Preset(EMBEDDED, None, 134_515_008, LAPTOP),
    )
}


def gpu_gib_needed(parameters: int) -> float:
    """A first, simple estimate of GPU memory for training under ZeRO-2 offload.

    bf16 weights (2 B a parameter), the int8 reference (1.05 B), one gradient bucket and the largest
    parameter's fp32 gradient, KV cache and activations (2 GiB covers the defaults), CUDA itself (0.7 GiB).
    """
    return parameters * 3.05 / 2**30 + parameters * 0.4 / 2**30 + 2.7


def largest_that_fits(gpu_gib: float) -> Preset | None:
    """The largest Qwen preset whose estimate fits the card, or None."""
    fitting = [p for p in PRESETS.values() if p.hub_id and gpu_gib_needed(p.parameters) <= gpu_gib]
    return max(fitting, key=lambda preset: preset.parameters, default=None)
