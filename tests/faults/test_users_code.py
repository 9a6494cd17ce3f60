"""Users' code that changes global state, is interrupted, or is stopped: the run ends as it would have without."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from grpo_ds.run_folder.trained_on import read_trained_on
from tests.faults.launched import flags, result, same, status, train


def set_fault(fault: str, at: int = 0) -> None:
    os.environ |= {"FAULT": fault, "FAULT_AT": str(at)}


def disturbed(model: Path, folder: Path, straight: Path) -> None:
    ended = train(flags(model, folder / "run"), folder / "log", partial(set_fault, "disturbs"))
    assert ended.code == 0, ended.out + ended.err
    assert "Mean reward: " in ended.out and "Traceback" not in ended.err
    assert same(result(folder / "run"), result(straight))


def test_state_that_a_reward_function_changes_at_import_and_at_every_call_changes_no_number(
    warm, tiny_folder, tmp_path, straight, tried
):
    warm(disturbed, tiny_folder, tmp_path, straight)
    tried("reward function that changes global state", "same metrics and weights, bit by bit")


def deleted(model: Path, folder: Path, straight: Path) -> None:
    run = folder / "run"

    def delete() -> None:
        set_fault("deletes the folder", 3)
        os.environ["FAULT_FILE"] = str(run)

    ended = train(flags(model, run), folder / "log", delete)
    assert ended.code == 0, ended.out + ended.err
    assert read_trained_on(run) == read_trained_on(straight) != frozenset()
    assert (run / "README.md").exists()
    assert "Traceback" not in ended.err
    assert same(result(run), result(straight))


def test_a_model_whose_folder_was_deleted_still_says_what_it_was_trained_on(
    warm, tiny_folder, tmp_path, straight, tried
):
    warm(deleted, tiny_folder, tmp_path, straight)
    tried("reward function that deletes the run's folder", "model and its record saved")


def interrupted(model: Path, folder: Path, straight: Path) -> None:
    """Ctrl-C reaches a function's worker processes, too, and the function fails because they end."""
    run = folder / "run"
    stopped = train(flags(model, run), folder / "log", partial(set_fault, "is interrupted", 3))
    assert stopped.code == 130, stopped.err
    assert (status(run)["state"], status(run)["exit_code"], status(run)["step"]) == ("stopped", 130, 2)
    again = train(stopped.resume_words, folder / "log")
    assert again.code == 0, again.err
    assert same(result(run), result(straight))


def test_a_function_that_fails_because_of_ctrl_c_does_not_hide_the_ctrl_c(warm, tiny_folder, tmp_path, straight, tried):
    warm(interrupted, tiny_folder, tmp_path, straight)
    tried("Ctrl-C that ends a reward function", "saved and resumed bit by bit")


LIMITED = """
import asyncio, sys, time
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import score

def computes(**_):
    print("called", flush=True)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    return [1.0]

def sleeps(seconds=0.2, **_):
    print("called", flush=True)
    time.sleep(seconds)
    return [1.0]

def hangs(**_):
    return sleeps(600)

async def waits(**_):
    print("called", flush=True)
    for _ in range(20):
        await asyncio.sleep(0.01)
    return [1.0]

async def waits_for_ever(**_):
    print("called", flush=True)
    await asyncio.sleep(600)

function = globals()[sys.argv[1]]
asked = ["a"], [Question("1", "Q?", "", "yes")]
print(score(*asked, functions={"it": (function, 1.0)}, timeout=2, on_error="zero").by_name["it"])
"""
STOPPED = {"computes": "[1.0]", "sleeps": "[1.0]", "waits": "[1.0]", "hangs": "[None]", "waits_for_ever": "[None]"}


def test_time_in_which_the_process_was_stopped_does_not_count_against_the_limit(tried):
    calls = {
        name: subprocess.Popen([sys.executable, "-c", LIMITED, name], stdout=subprocess.PIPE, text=True)
        for name in STOPPED
    }
    for call in calls.values():
        assert call.stdout is not None and call.stdout.readline() == "called\n"
        call.send_signal(signal.SIGSTOP)
    time.sleep(2.1)  # more than the limit
    for call in calls.values():
        call.send_signal(signal.SIGCONT)
    assert {name: call.communicate()[0].strip() for name, call in calls.items()} == STOPPED
    for name in STOPPED:
        tried("process stopped during a reward call", "limit kept" if "None" in STOPPED[name] else "time not counted")
