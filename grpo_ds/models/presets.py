"""Models by short name, and the recipe that suits each: defaults for the flags a person did not type.

Standard library only: the command line needs it before anything heavy is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpo_ds.config import prompt_recipe


@dataclass(frozen=True, slots=True)
class Preset:
    """A named model."""

    name: str
    hub_id: str | None  # None: comes from a wheel (models/embedded.py)
    parameters: int
    recipe: Mapping[str, object] = field(default_factory=dict)  # flag name -> default


EMBEDDED = "smollm2-135m"

# For a laptop: a 135M model keeps to the format only when shown (a worked example, the opening tag
# prefilled), learns at 20 times a large model's rate, and must not wait for 300 tokens on two cores.
LAPTOP = {
    "few_shot": 1,
    "prefill": True,
    "num_generations": 8,
    "max_prompt_length": 512,
    "max_completion_length": 48,
    "learning_rate": 2e-5,
    "num_steps": 14,
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


@dataclass(frozen=True, slots=True)
class Choice:
    """The model a run uses, why, and the defaults that suit it."""

    model: str
    why: str
    recipe: Mapping[str, object]
    needs_gpu: bool  # it was chosen for the card


def choose_model(name: str, *, gpu_gib: float | None, ram_gib: float) -> Choice:
    """What --model means on this machine; `auto` is the largest Qwen that fits the card and the RAM."""
    if name in PRESETS:
        return Choice(name, "as asked", PRESETS[name].recipe, needs_gpu=False)
    if name != "auto":
        return Choice(name, "as asked", prompt_recipe(Path(name)), needs_gpu=False)
    if gpu_gib is None:
        return Choice(EMBEDDED, "no GPU here, so the model that comes with the installation", LAPTOP, needs_gpu=False)
    fitting = [p for p in PRESETS.values() if p.hub_id and fits(p.parameters, gpu_gib=gpu_gib, ram_gib=ram_gib)]
    machine = f"{gpu_gib:.0f} GiB GPU and {ram_gib:.0f} GiB RAM"
    if not fitting:
        return Choice(EMBEDDED, f"no Qwen fits {machine}", LAPTOP, needs_gpu=True)
    best = max(fitting, key=lambda preset: preset.parameters)
    return Choice(best.name, f"the largest Qwen that fits {machine}", best.recipe, needs_gpu=True)


def fits(parameters: int, *, gpu_gib: float, ram_gib: float) -> bool:
    """A first, simple estimate under ZeRO-2 offload; a planner will replace it.

    GPU: bf16 weights 2 bytes a parameter, the int8 reference 1.03, the largest parameter's gradient in bf16
    and fp32 about 0.4, and 2.7 GiB for one gradient bucket, KV cache, activations and CUDA itself.
    Host: fp32 master and gradient, bf16 staging, 8-bit moments: 12.03 bytes, and 4 GiB for the processes.
    """
    gib = parameters / 2**30
    return 3.43 * gib + 2.7 <= gpu_gib and 12.03 * gib + 4 <= ram_gib
