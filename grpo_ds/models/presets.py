"""Models by short name, each with its recipe: defaults for the flags that were not typed.

Standard library only: the command line needs it before anything heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_ds.settings.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """A named model."""

    name: str
    hub_id: str | None  # None: it comes from a wheel (models/embedded.py)
    parameters: int
    recipe: Mapping[str, object] = field(default_factory=dict)  # flag name -> default


EMBEDDED = "smollm2-135m"

# For a laptop. A 135M model needs help with the answer format: the opening tag prefilled, and a worked example of each
# class (with one example it always copies that answer). Its learning rate is 5 times a large model's; with 20 times it
# answered "yes" to every question after 12 steps (docs/results.md). 300 tokens would take too long on two cores.
LAPTOP = {
    "few_shot": 2,
    "prefill": True,
    "num_generations": 8,
    "max_prompt_length": 512,
    "max_completion_length": 48,
    "learning_rate": 5e-6,
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


LORA_RATE = 10  # an adapter's learning rate / the rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret)


def lora_recipe(recipe: Mapping[str, object], config: TrainConfig) -> Mapping[str, object]:
    """Return the model's recipe, with the learning rate of an adapter if one is trained."""
    rate = recipe.get("learning_rate", TrainConfig.learning_rate)
    return {**recipe, "learning_rate": LORA_RATE * float(str(rate))} if config.lora_r else recipe
