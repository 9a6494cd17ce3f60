"""The config saved beside a model: how it was trained, and its prompt."""

from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.errors import UsageError, one_error
from grpo_ds.settings.config import AskConfig
from grpo_ds.settings.config_file import read_settings
from grpo_ds.settings.data_flags import DataFlags
from grpo_ds.settings.flags import all_flags
from grpo_ds.settings.paths import absolute
from grpo_ds.system.files import write_whole
from grpo_ds.task.sources import RECORDS
from grpo_ds.task.worked_examples import BIOMEDICAL

CONFIG_FILE = "grpo_config.yaml"
SYSTEM_PROMPT_FILE = "system_prompt.txt"  # a copy of --system_prompt
# Not saved: another run has its own.
OF_ONE_RUN = (
    *("output_dir", "resume_from_checkpoint", "resume_changed_inputs", "num_seeds"),
    *("plan", "gpu_gib", "ram_gib"),
)


def write_config(config: AskConfig, folder: Path) -> None:
    """Write the resolved config as YAML; `--config` reads it back, for a run in a new folder."""
    names = [flag.name for flag in all_flags(type(config)) if flag.name not in OF_ONE_RUN]
    values = {name: getattr(config, name) for name in names}
    if config.system_prompt:
        write_whole(folder / SYSTEM_PROMPT_FILE, f"{config.system_prompt_text}\n")
    write_whole(folder / CONFIG_FILE, yaml.safe_dump(values, sort_keys=False))


def prompt_recipe(folder: Path) -> dict[str, Any]:
    """Prompt flags of a model that we trained, from the config saved beside it; {} without one."""
    # Only the user may allow code to run here, not a file that came with a model.
    return _recipe(folder, [flag for flag in all_flags(AskConfig) if flag.name not in ("model", "trust_remote_code")])


def split_recipe(folder: Path) -> dict[str, Any]:
    """Data and split of a model that we trained, from the config saved beside it; {} without one."""
    saved = _recipe(folder, [flag for flag in all_flags(DataFlags) if flag.name in ("data", "eval_fraction", "seed")])
    return {name: value for name, value in saved.items() if value != RECORDS}


def _recipe(folder: Path, allowed: "list[Field[Any]]") -> dict[str, Any]:
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        return {}
    values, problems = read_settings(saved, allowed, strict=False)
    if problems:
        raise one_error(
            UsageError,
            f"{saved} is damaged:",
            problems,
            "It has the prompt that the model was trained with: restore it, or remove it and give the prompt's flags.",
        )
    return with_copied_prompt(values, saved)


def with_copied_prompt(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings that `file` holds; a run's saved config has a copy of its system prompt beside it."""
    if file.name != CONFIG_FILE:
        return dict(values)
    copy = {"system_prompt": absolute(str(file.with_name(SYSTEM_PROMPT_FILE)))}
    older = "few_shot" in values and "subject" not in values  # a version whose prompts were all biomedical
    return {
        **values,
        **(copy if values.get("system_prompt") else {}),
        **({"subject": BIOMEDICAL} if older else {}),
    }
