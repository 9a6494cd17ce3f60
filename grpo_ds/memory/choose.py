"""Choose the model that `--model` names; `auto` is the largest Qwen whose memory plan fits this machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo_ds.memory.select import Job, fits, with_room_for_its_reference
from grpo_ds.models.presets import EMBEDDED, LAPTOP, PRESETS
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig, resolve_ds_config
from grpo_ds.settings.saved_config import prompt_recipe
from grpo_ds.settings.shipped import DS_JSONS


@dataclass(frozen=True, slots=True)
class Choice:
    """The model of a run, the reason for it, and the defaults that suit it.

    Example:
        Choice("qwen2.5-3b", "the largest Qwen that fits 16 GiB GPU and 32 GiB RAM", recipe={}, needs_gpu=True)
    """

    model: str
    why: str
    recipe: Mapping[str, object]
    needs_gpu: bool  # the model was chosen because there is a card


def default_run() -> tuple[TrainConfig, DsConfig]:
    """Return flags and DeepSpeed JSON of a run with every flag at its default."""
    config = TrainConfig()
    return config, resolve_ds_config(DS_JSONS.folder / Path(config.ds).name, fill=config.ds_sizes(native="bf16"))


def choose_model(
    name: str,
    *,
    gpu_gib: float | None,
    ram_gib: float,
    run: Callable[[], tuple[TrainConfig, DsConfig]] = default_run,
) -> Choice:
    """Return the model that --model names; for `auto` the largest Qwen that this card and this RAM can train.

    run: returns flags and DeepSpeed JSON of that training; called only for `auto`.
    """
    if name in PRESETS:
        return Choice(name, "set by --model", PRESETS[name].recipe, needs_gpu=False)
    if name != "auto":
        return Choice(name, "set by --model", prompt_recipe(Path(name)), needs_gpu=False)
    if gpu_gib is None:
        return Choice(EMBEDDED, "no GPU here, so the model that comes with the installation", LAPTOP, needs_gpu=False)
    config, ds = run()
    qwens = [preset for preset in PRESETS.values() if preset.hub_id]
    fitting = [q for q in qwens if _fits(Job(shape_of(q.name), config, ds), gpu_gib, ram_gib)]
    machine = f"{gpu_gib:.0f} GiB of GPU memory and {ram_gib:.0f} GiB of RAM"
    if not fitting:
        return Choice(EMBEDDED, f"no Qwen fits {machine}", LAPTOP, needs_gpu=True)
    best = max(fitting, key=lambda preset: preset.parameters)
    return Choice(best.name, f"the largest Qwen that fits {machine}", best.recipe, needs_gpu=True)


def _fits(job: Job, gpu_gib: float, ram_gib: float) -> bool:
    return fits(with_room_for_its_reference(job, gpu_gib, ram_gib).plan(), gpu_gib, ram_gib)
