"""How this process was started, so that the commands it names are ones the person can type.

Three doors lead to a command: `grpo-ds train`, `python -m grpo_ds train` and `python launch/train.py`; launchers
take the last two.
"""

import os
import sys
from pathlib import Path

SCRIPTS = {  # command -> its script in launch/
    "train": "train.py",
    "eval": "evaluate_model.py",
    "select": "select_model.py",
    "profile": "profile_memory.py",
    "ask": "ask.py",
    "report": "report.py",
}


def entry() -> str:
    """`grpo-ds` or `python -m grpo_ds`, where one of them was typed; "" where a script was."""
    file = Path(sys.argv[0])
    if file.name == "grpo-ds":
        return "grpo-ds"
    return "python -m grpo_ds" if file.parts[-2:] == ("grpo_ds", "__main__.py") else ""


def program() -> str | None:
    """What --help calls this program: None leaves it to argparse, which takes the script's name."""
    return f"{entry()} {_name()}" if entry() else None


def command(name: str, *, launcher: str = "python") -> str:
    """Another command, through the door that this one came through; the launcher is a script's."""
    return f"{entry()} {name}" if entry() else f"{launcher} launch/{SCRIPTS[name]}"


def alone() -> list[str]:
    """The words that start this command again, without its flags."""
    return [*entry().split(), _name()] if entry() else ["python", os.path.relpath(sys.argv[0])]


def under_a_launcher(module_flag: str) -> list[str]:
    """The same, as a launcher takes them."""
    return [module_flag, "grpo_ds", _name()] if entry() else [os.path.relpath(sys.argv[0])]


def _name() -> str:
    """The command that was typed; the deepspeed launcher puts a flag of its own in front of it."""
    return next((word for word in sys.argv[1:] if not word.startswith("--local_rank")), "")
