"""CONTRIBUTING.md shows where everything is: its map names every module, and the files that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def listed() -> dict[str, set[str]]:
    """Return folder -> modules that the map lists for it."""
    (block,) = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    lines = re.sub(r"\n\s+", " ", block).splitlines()
    return {line.split("/")[0]: set(re.findall(r"\w+", line)) for line in lines if re.match(r"\w+/ ", line)}


def test_the_map_names_every_folder_and_every_module():
    folders = {folder.parent.name: folder.parent for folder in (ROOT / "grpo_ds").glob("*/__init__.py")}
    modules = {name: {file.stem for file in folder.glob("*.py")} - {"__init__"} for name, folder in folders.items()}
    modules["report"] -= {"tensorboard_tracker", "trackio_tracker", "wandb_tracker"}  # "a module for each tracker"
    assert listed().keys() == modules.keys()
    assert {name: missing for name in modules if (missing := modules[name] - listed()[name])} == {}


def test_the_named_files_exist():
    """A path is named from the top of the repository or, for a module, from grpo_ds/."""
    named = re.findall(r"`([\w.]+/[\w./]+\.\w+)`", PAGE)
    assert len(named) > 15
    assert [file for file in named if not (ROOT / file).exists() and not (ROOT / "grpo_ds" / file).exists()] == []
