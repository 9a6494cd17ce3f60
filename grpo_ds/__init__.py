"""GRPO for questions with known answers on one small graphics card.

from grpo_ds import TrainConfig, train
run = train(TrainConfig(model="qwen2.5-0.5b", num_steps=20), data=records, reward_funcs=[my_reward, "format"])
"""

from importlib import import_module
from typing import Any

__all__ = ["TrainConfig", "TrainedRun", "train"]
DOORS = {"TrainConfig": "settings.config", "TrainedRun": "commands.in_python", "train": "commands.in_python"}


def __getattr__(name: str) -> Any:
    """Import a door when it is used, so that every command still begins at once."""
    if name not in DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{DOORS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
