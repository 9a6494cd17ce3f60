"""One run under the real deepspeed launcher that is killed or stopped five times: each new start resumes it, and in the
end it equals an undisturbed run."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from grpo_ds.system.ranks import _free_port
from tests.faults.launched import flags, result, same, status, train_to_the_end
from tests.training.test_training import ROOT

TIMEOUT = 120.0  # seconds; a busy machine needs half a minute to load a model
STEPS = 7


class Launched:
    """`deepspeed launch/train.py`, which will wait in the reward function of its second step."""

    def __init__(self, words: list[str], folder: Path, fault: str = "waits") -> None:
        self.waiting, self.log = folder / "waiting", folder / "log.txt"
        environment = {"FAULT": fault, "FAULT_AT": "2", "FAULT_FILE": str(self.waiting)}
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--master_port", str(_free_port()), *words]  # the default may be in use
        with self.log.open("w") as log:
            self.runner = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
            )
        self.found: dict[str, psutil.Process] = {}
        self.until(self.begun, "it begins")
        self.launch, self.train = self.found["launch"], self.found["train"]

    def begun(self) -> bool:
        """Return True if both processes below the runner exist.

        A child shows its parent's command line until its own program has begun, so each is known by its parent too.
        """
        assert self.runner.poll() is None, self.log.read_text()[-3000:]
        for name, parent in (("launch", psutil.Process(self.runner.pid)), ("train", self.found.get("launch"))):
            for process in parent.children() if parent else []:
                with suppress(psutil.Error):
                    words = process.cmdline()
                    launches = "deepspeed.launcher.launch" in words
                    if "launch/train.py" in words and launches == (name == "launch"):
                        self.found.setdefault(name, process)
        return len(self.found) == 2

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"timed out: {what}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def noticed(self) -> None:
        """Wait until the run has noticed the stop request, then let it leave the reward function."""
        self.until(lambda: "saving at the next safe point" in self.log.read_text(), "it noticed")
        self.waiting.unlink()

    def end(self) -> int:
        """Wait until the launcher and its processes have ended; return its exit code."""
        self.until(lambda: not any(map(is_alive, (self.launch, self.train))), "all are gone")
        return self.runner.wait(TIMEOUT)


def waiting(words: list[str], folder: Path) -> Launched:
    launched = Launched(words, folder)
    launched.until(lambda: launched.begun() and launched.waiting.exists(), "it waits")
    return launched


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def undisturbed(warm, tiny_folder, tmp_path):
    """Folder of an undisturbed run."""
    words = flags(tiny_folder, tmp_path / "undisturbed", num_steps=STEPS)
    warm(train_to_the_end, words, tmp_path)
    return tmp_path / "undisturbed"


def test_one_run_through_five_deaths_under_the_launcher(undisturbed, warm, tiny_folder, tmp_path, tried):
    run = tmp_path / "run"
    auto = ["launch/train.py", "--resume_from_checkpoint", "auto", "--output_dir", str(run)]

    def stopped(step: int) -> None:
        now = status(run)
        assert (now["state"], now["exit_code"], now["step"]) == ("stopped", 75, step), now
        assert f"checkpoint-{step}" in now["resume"]

    first = waiting(["launch/train.py", *flags(tiny_folder, run, num_steps=STEPS, save_steps=1)], tmp_path)
    first.train.send_signal(signal.SIGUSR1)
    first.noticed()
    assert first.end() == 75
    stopped(1)
    tried("signal under deepspeed", "exit code passed on")

    line = next(line for line in first.log.read_text().splitlines() if "Resume with: " in line)
    command = shlex.split(line.partition(": deepspeed ")[2])
    second = waiting(command, tmp_path)
    for process in (second.runner, second.launch, second.train):
        process.send_signal(signal.SIGKILL)
    second.waiting.unlink()
    second.end()
    assert status(run)["state"] == "training" and status(run)["pid"] == second.train.pid
    tried("kill -9 of all processes", "resumed")

    third = waiting(auto, tmp_path)
    third.runner.kill()
    third.noticed()
    third.end()
    stopped(3)
    tried("kill -9 of the launcher", "saved, no orphan")

    fourth = waiting(auto, tmp_path)
    fourth.launch.kill()
    fourth.noticed()
    fourth.end()
    stopped(4)
    tried("kill -9 of the launcher", "saved, no orphan")

    fifth = waiting(auto, tmp_path)
    os.killpg(fifth.runner.pid, signal.SIGINT)  # Ctrl-C in a terminal goes to all of them
    fifth.noticed()
    assert fifth.end() in (130, -signal.SIGINT)
    assert (status(run)["state"], status(run)["exit_code"], status(run)["step"]) == ("stopped", 130, 5)
    tried("signal under deepspeed", "exit code passed on")

    warm(train_to_the_end, auto[1:], tmp_path)
    assert same(result(run), result(undisturbed))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == list(range(1, STEPS + 1))
    tried("kill -9 of all processes", "in the end the same run bit by bit")


def test_a_launcher_killed_while_the_model_is_loaded_leaves_no_orphan(tiny_folder, tmp_path, tried):
    run, many = tmp_path / "run", 100_000  # steps, in case the machine loads the model before it notices
    words = ["launch/train.py", *flags(tiny_folder, run, num_steps=many)]
    launched = Launched(words, tmp_path, fault="none")
    launched.until(lambda: "Plan: " in launched.log.read_text(), "it says what it will do")
    launched.launch.kill()
    launched.end()
    log = launched.log.read_text()
    if "nothing to save" in log:
        assert not run.exists()
    else:  # the model was loaded before it noticed
        state = json.loads((run / "run_status.json").read_text())
        assert "Resume with: " in log and (state["state"], state["exit_code"]) == ("stopped", 75)
    tried("kill -9 of the launcher", "stopped, no orphan")
