"""launch/train.py, run in a fork with real arguments, signals and exit codes."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from grpo_ds.run_folder.status import resume_command
from grpo_ds.system.script import run_script
from tests.faults.forks import fork
from tests.training.test_training import ROOT

SCRIPT = "launch/train.py"
FLAGS = {
    "ds": "ds_configs/zero2.json", "data": "sample", "num_steps": 3, "num_generations": 3, "batch_size": 2,
    "max_prompt_length": 480, "max_completion_length": 6, "learning_rate": 5e-3, "beta": 0.1, "eval_limit": 2,
    "save_steps": 0, "preflight": "false", "reward_funcs": f"{ROOT}/tests/data/fault_rewards.py:faulty",
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a fork of launch/train.py."""

    code: int
    out: str
    err: str

    @property
    def resume_words(self) -> list[str]:
        """Arguments of the resume command that it printed."""
        (line,) = [line for line in (self.out + self.err).splitlines() if "Resume with: " in line]
        launcher, script, *words = shlex.split(line.partition("Resume with: ")[2])
        assert (launcher, script) == ("python", SCRIPT)
        return words


def flags(model: Path, folder: Path, **changes: Any) -> list[str]:
    settings = {**FLAGS, "model": model, "output_dir": folder, **changes}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def train(words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> Ended:
    """Run `python launch/train.py WORDS` in a fork, after calling `before` in it."""
    log.mkdir(parents=True, exist_ok=True)
    code, failure = fork(lambda: _train(words, log, before))
    out, err = ((log / name).read_text() for name in ("out", "err"))
    return Ended(code, out, err + (failure or ""))


def _train(words: list[str], log: Path, before: Callable[[], None]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    sys.argv = [SCRIPT, *words]
    resume_command.__defaults__ = (SCRIPT, tuple(words))  # set from sys.argv at import
    from grpo_ds.commands.train import main

    before()
    run_script(main)


def train_to_the_end(words: list[str], log: Path) -> None:
    ended = train(words, log)
    assert ended.code == 0, ended.err


def result(folder: Path, model: str = "") -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Result of a finished run: its metrics without times and memory, and its weights, of a subfolder if named."""
    clocks = ("seconds/", "memory/", "tokens_per_second", "step_time")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in history]
    return lines, load_file(folder / model / "model.safetensors")


def same(one: tuple, other: tuple) -> bool:
    """Return True if two results are equal bit by bit."""
    return one[0] == other[0] and all(torch.equal(one[1][name], weight) for name, weight in other[1].items())


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run_status.json").read_text())
