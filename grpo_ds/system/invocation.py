"""The command that started this process, so that messages show commands that the user can type.

A command has three entry points: `grpo-ds train`, `python -m grpo_ds train` and `python launch/train.py`; launchers
use the last two. Within `grpo_ds.train(...)` sys.argv is that of the user's script, so nothing is read from it.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCAL_RANK = "--local_rank="  # the deepspeed launcher puts it before all other arguments
SCRIPTS = {  # command -> its script in launch/
    "train": "train.py",
    "eval": "evaluate_model.py",
    "data": "show_data.py",
    "select": "select_model.py",
    "profile": "profile_memory.py",
    "ask": "ask.py",
    "report": "report.py",
}
FROM_PYTHON = "grpo_ds.train"  # the function behind this name started the run

_called: list[str] = []  # FROM_PYTHON while it runs


@contextmanager
def called_from_python() -> Iterator[None]:
    """Say within that a script or a notebook has called `grpo_ds.train`."""
    _called.append(FROM_PYTHON)
    try:
        yield
    finally:
        _called.pop()


def is_from_python() -> bool:
    """Return True within `grpo_ds.train(...)`."""
    return bool(_called)


def entry() -> str:
    """`grpo-ds` or `python -m grpo_ds`, as typed; "" for a script of launch/."""
    if _called:
        return "grpo-ds"
    file = Path(sys.argv[0])
    if file.name == "grpo-ds":
        return "grpo-ds"
    return "python -m grpo_ds" if file.parts[-2:] == ("grpo_ds", "__main__.py") else ""


def program() -> str | None:
    """Name of this program in --help; None: argparse takes the script's name."""
    return f"{entry()} {_name()}" if entry() else None


def command(name: str, *, launcher: str = "python") -> str:
    """Words that start another command through the same entry point; `launcher` is used only for scripts."""
    if entry():
        return f"{entry()} {name}"
    script = Path(sys.argv[0])
    folder = _from_here(script.parent) if script.name in SCRIPTS.values() else "launch"
    return f"{launcher} {shlex.quote(os.path.join(folder, SCRIPTS[name]))}"


def restart_words(*, anywhere: bool = False) -> list[str]:
    """Words that start this command again, with its launcher, without its flags.

    anywhere: from any folder, so the script has its absolute path.
    """
    if _called:
        return [FROM_PYTHON]
    script = (os.path.abspath if anywhere else os.path.relpath)(sys.argv[0])
    ranks = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks))  # on this machine
    if any(word.startswith(LOCAL_RANK) for word in sys.argv):
        # On one card deepspeed starts one rank by itself; with --num_gpus it would ignore CUDA_VISIBLE_DEVICES.
        cards = ["--hostfile", "HOSTS"] if here != ranks else ["--num_gpus", ranks] if ranks != "1" else []
        return ["deepspeed", *cards, *_launched("--module", script)]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = ["--nnodes", str(int(ranks) // int(here))] if here != ranks else []
        return ["torchrun", *nodes, "--nproc_per_node", here, *_launched("-m", script)]
    return [*entry().split(), _name()] if entry() else ["python", script]


def again(flags: list[str]) -> list[str]:
    """Words that run this command in a new process, with other flags, by the same Python and as if launched alike."""
    ranks = [word for word in sys.argv[1:] if word.startswith(LOCAL_RANK)]
    start = ["-m", "grpo_ds"] if entry().startswith("python") else [sys.argv[0]]
    return [sys.executable, *start, *ranks, *([_name()] if entry() else []), *flags]


def typed_here(command: str) -> str:
    """Return a command that works from any folder as it may be typed in this one: with a shorter path to the script."""
    if _called:
        return command
    return command.replace(shlex.quote(os.path.abspath(sys.argv[0])), shlex.quote(_from_here(Path(sys.argv[0]))), 1)


def flag_words() -> list[str]:
    """Flags of this command, as typed."""
    if _called:
        return []
    words = [word for word in sys.argv[1:] if not word.startswith(LOCAL_RANK)]
    return words[1:] if entry() else words


def _launched(module_flag: str, script: str) -> list[str]:
    """Arguments of a launcher: the script or the module."""
    return [module_flag, "grpo_ds", _name()] if entry() else [script]


def _from_here(path: Path) -> str:
    """Return the path from the working folder if it is inside, else the absolute one."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.split(os.sep)[0] == os.pardir else relative


def _name() -> str:
    """Name of the command, as typed."""
    return next((word for word in sys.argv[1:] if not word.startswith(LOCAL_RANK)), "")
