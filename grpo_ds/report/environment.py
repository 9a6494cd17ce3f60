"""environment.json: versions, machine and commands of a run. It contains no environment variable."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grpo_ds.run_folder.files import ENVIRONMENT_FILE
from grpo_ds.system.files import write_whole
from grpo_ds.system.hardware import ram_gib
from grpo_ds.system.invocation import flag_words, restart_words

PACKAGES = ("grpo_ds", "torch", "transformers", "deepspeed", "bitsandbytes", "peft", "accelerate", "datasets")


def write_environment(folder: Path, *, ranks: int) -> None:
    """Write environment.json; a resumed run overwrites it, but for the commands of the runs before it."""
    found = environment(ranks)
    earlier = [command for command in _commands(folder / ENVIRONMENT_FILE) if command != found["command"]]
    found["commands"] = [*earlier, found["command"]]
    write_whole(folder / ENVIRONMENT_FILE, json.dumps(found, indent=1) + "\n")


def _commands(file: Path) -> list[list[str]]:
    """Return the commands in a run's file, the first one first; none if it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return list(found.get("commands") or [found["command"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def environment(ranks: int) -> dict[str, Any]:
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(ram_gib(), 1),
        "gpus": [f"{card.name}, {card.total_memory / 2**30:.1f} GiB" for card in cards],
        "ranks": ranks,
        "command": [*restart_words(), *flag_words()],  # contains no key: command_line.py refuses them
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
