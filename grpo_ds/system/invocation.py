"""How this process was started, so that the commands it names are ones the person can type.

Three doors lead to a command: `grpo-ds train`, `python -m grpo_ds train` and `python launch/train.py`; launchers
take the last two.
"""

import os
import shlex
import sys
from pathlib import Path

LOCAL_RANK = "--local_rank="  # the deepspeed launcher puts it before all other words
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
    if entry():
        return f"{entry()} {name}"
    script = Path(sys.argv[0])
    folder = os.path.relpath(script.parent) if script.name in SCRIPTS.values() else "launch"
    return f"{launcher} {shlex.quote(os.path.join(folder, SCRIPTS[name]))}"


def started() -> list[str]:
    """The words that start this command again, its launcher's among them and its flags not."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks))  # on this machine
    if any(word.startswith(LOCAL_RANK) for word in sys.argv):
        # One rank is what deepspeed starts by itself on one card; told a number it overlooks CUDA_VISIBLE_DEVICES.
        cards = ["--hostfile", "HOSTS"] if here != ranks else ["--num_gpus", ranks] if ranks != "1" else []
        return ["deepspeed", *cards, *_launched("--module")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = ["--nnodes", str(int(ranks) // int(here))] if here != ranks else []
        return ["torchrun", *nodes, "--nproc_per_node", here, *_launched("-m")]
    return [*entry().split(), _name()] if entry() else ["python", os.path.relpath(sys.argv[0])]


def flags() -> list[str]:
    """What was typed behind them."""
    words = [word for word in sys.argv[1:] if not word.startswith(LOCAL_RANK)]
    return words[1:] if entry() else words


def _launched(module_flag: str) -> list[str]:
    """What a launcher is given to start."""
    return [module_flag, "grpo_ds", _name()] if entry() else [os.path.relpath(sys.argv[0])]


def _name() -> str:
    """The command that was typed."""
    return next((word for word in sys.argv[1:] if not word.startswith(LOCAL_RANK)), "")
