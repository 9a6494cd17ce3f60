"""Models by short name, each with its recipe: defaults for the flags that were not typed.

Standard library only: the command line needs it before anything heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_checks import SGD
from grpo_ds.settings.ds_config import optimizer_type


@dataclass(frozen=True, slots=True)
class Preset:
    """A named model."""

    name: str
    hub_id: str | None  # None: it comes from a wheel (models/embedded.py)
    parameters: int
    recipe: Mapping[str, object] = field(default_factory=dict)  # flag name -> default


EMBEDDED = "smollm2-135m"

# For a laptop. A 135M model needs help with the answer format: the opening tag prefilled, and a worked example of each
# class (with one example it always copies that answer). bare_label keeps its reasoning, which otherwise shrinks to the
# label; four questions a step and a rate that falls to 0 let it end without a lean to one label (docs/results.md).
# 300 tokens would take too long on two cores.
LAPTOP = {
    "few_shot": 2,
    "prefill": True,
    "batch_size": 4,
    "num_generations": 4,
    "max_prompt_length": 512,
    "max_completion_length": 48,
    "reward_funcs": "correctness,format,bare_label",
    "learning_rate": 1.5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 4,
    "num_steps": 22,
    "eval_limit": 32,
}

# A 0.5B model writes the bare label unless its reasoning has begun: of 24 answers none was in form, prefilled 19 were;
# 1.5B opens the tag by itself (docs/log.md).
HALF_BILLION = {"prefill": True}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, HALF_BILLION),
        Preset("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        Preset("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        Preset("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        Preset(EMBEDDED, None, 134_515_008, LAPTOP),
    )
}


LORA_RATE = 10  # an adapter's learning rate / the rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret)


SGD_RATE = 1000  # SGD's learning rate / AdamW's (docs/decisions/0010-adam-or-sgd.md)


def recipe_for(recipe: Mapping[str, object], config: TrainConfig) -> Mapping[str, object]:
    """Return the model's recipe with the learning rate that suits an adapter, or the JSON's SGD."""
    lora, sgd = config.lora_r > 0, optimizer_type(config.ds) == SGD
    return {**recipe, "learning_rate": usual_rate(recipe, lora=lora, sgd=sgd)} if lora or sgd else recipe


def far_below(rate: float, usual: float) -> bool:
    """True for a rate that can hardly be meant: Adam's for SGD, for example."""
    return rate < usual / 30


def usual_rate(recipe: Mapping[str, object], *, lora: bool, sgd: bool) -> float:
    """Return the learning rate of a recipe for all parameters and AdamW, times what an adapter and SGD need."""
    rate = float(str(recipe.get("learning_rate", TrainConfig.learning_rate)))
    return rate * (LORA_RATE if lora else 1) * (SGD_RATE if sgd else 1)
