"""Stop requests at any moment: the run saves and stops, and the resumed run equals an uninterrupted one bit by bit."""

import os
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from grpo_ds.memory.phases import Profiler
from grpo_ds.run_folder.checkpoints import found_in
from grpo_ds.run_folder.resume import to_resume
from grpo_ds.system.signals import Interrupted
from grpo_ds.training.flat_rewards import FLAT_STEPS
from tests.faults.forks import fork, join_fake_ranks
from tests.faults.launched import Ended, flags, result, same, status, train
from tests.training.test_resume import KINDS, finish, make_run

ALL = "offload, int8 reference"


# --- at every safe point -----------------------------------------------------------------------------------


def interrupted_at_safe_points(model: Path, folder: Path, kind: str, every: int) -> int:
    """Stop copies of a run at its safe points, check that each one resumes to the same end, and return their number."""
    join_fake_ranks()
    run = make_run(model, kind, folder / "straight")
    check, passed, stopped = run.trainer.interruption.check, 0, list[Path]()

    def stopping_copies() -> None:
        nonlocal passed
        passed += 1
        if passed % every == 0 and not run.trainer.interruption.signum:
            there = folder / str(passed)
            if pid := os.fork():
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert code == 75, f"exit code {code} at point {passed}"
                stopped.append(there)
            else:
                run.folder = run.status.folder = there
                run.trainer.interruption.signum = signal.SIGTERM
        check()

    run.trainer.interruption.check = stopping_copies  # type: ignore[method-assign]
    original = os.getpid()
    try:
        metrics, weights = finish(run)
    except Interrupted as end:
        os._exit(end.exit_code)
    finally:
        if os.getpid() != original:
            traceback.print_exc()
            os._exit(1)
    for there in stopped:
        code, failure = fork(partial(ends_as, metrics, weights, model, kind, there))
        assert code == 0, f"stopped at point {there.name} of {passed}: {failure}"
    return len(stopped)


def ends_as(metrics: list, weights: dict, model: Path, kind: str, there: Path) -> None:
    origin, warnings = to_resume("auto", there)
    assert not warnings and len(found_in(there)) == 1
    again, state = finish(make_run(model, kind, there, origin))
    assert again == metrics
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_safe_points_of_every_kind_of_run_it_resumes_bit_by_bit(
    kind, warm, tiny_folder, tmp_path, tried
):
    points = warm(interrupted_at_safe_points, tiny_folder, tmp_path, kind, 1 if kind == ALL else 14)
    assert points >= (40 if kind == ALL else 3)
    for _ in range(points):
        tried("interrupted at a safe point", "resumed bit by bit")


# --- by signals --------------------------------------------------------------------------------------------

# (phase, entered for the n-th time, signal, step that is saved); None: there is nothing to save yet.
MOMENTS = [
    ("load", 1, signal.SIGTERM, None),
    ("load", 1, signal.SIGINT, None),
    ("initialise", 1, signal.SIGUSR1, None),
    ("initialise", 1, signal.SIGHUP, None),
    ("evaluate", 1, signal.SIGUSR1, 0),
    ("floor", 1, signal.SIGINT, 0),
    ("sample", 2, signal.SIGTERM, 1),
    ("sample", 3, signal.SIGINT, 2),
    ("sample", 2, signal.SIGUSR1, 1),
    ("sample", 2, signal.SIGHUP, 1),
    ("reference", 3, signal.SIGTERM, 2),  # the first time, the reference is made
    ("update", 2, signal.SIGINT, 2),
    ("step", 1, signal.SIGUSR1, 1),
    ("save", 1, signal.SIGTERM, 2),  # this save is completed first
    ("evaluate", 2, signal.SIGINT, 3),
]
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


def signal_at(phase: str, count: int, number: int) -> None:
    """Send this process a signal when it enters the phase for the given time."""
    at(phase, count, lambda: os.kill(os.getpid(), number))


def at(phase: str, count: int, act: Callable[[], None]) -> None:
    """Call `act` when this process enters the phase for the given time."""
    entered, enter = 0, Profiler.phase

    @contextmanager
    def watched(self, name):
        nonlocal entered
        with enter(self, name):
            if name == phase:
                entered += 1
                if entered == count:
                    act()
            yield

    Profiler.phase = watched


def signalled(model: Path, folder: Path, straight: Path, moment: tuple) -> None:
    phase, count, number, step = moment
    run = folder / "run"
    words = flags(model, run, save_steps=2 if phase == "save" else 0)
    stopped = train(words, folder / "log", partial(signal_at, phase, count, number))
    assert stopped.code == CODES[number], stopped.err
    assert "Traceback" not in stopped.err
    if step is None:
        assert "nothing to save" in stopped.err and not run.exists()
        return
    now = status(run)
    assert (now["state"], now["exit_code"], now["step"]) == ("stopped", stopped.code, step)
    assert len(found_in(run)) == 1
    resumed = train(stopped.resume_words, folder / "log")
    assert resumed.code == 0, resumed.err
    assert same(result(run), result(straight)) and status(run)["state"] == "done"


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_signal_in_any_phase_ends_with_its_code_and_a_command_that_works(
    moment, straight, warm, tiny_folder, tmp_path, tried
):
    warm(signalled, tiny_folder, tmp_path, straight, moment)
    tried("signal in a phase", "nothing to save" if moment[-1] is None else "saved and resumed bit by bit")


def signalled_at_the_end(model: Path, folder: Path) -> None:
    """A signal while the final model is written stops nothing; a run that is resumed after it ends the same."""
    run = folder / "run"
    ended = train(
        flags(model, run, num_steps=1, save_steps=1), folder / "log", partial(signal_at, "save", 2, signal.SIGTERM)
    )
    assert ended.code == 0, ended.err
    assert status(run)["state"] == "done"
    before = result(run)
    moved = run.rename(folder / "moved")
    again = train(["--resume_from_checkpoint", "auto", "--output_dir", os.path.relpath(moved)], folder / "log")
    assert again.code == 0 and same(result(moved), before), again.err


def test_a_finished_run_can_be_moved_and_resumed_and_is_finished_again(warm, tiny_folder, tmp_path, tried):
    warm(signalled_at_the_end, tiny_folder, tmp_path)
    tried("signal in a phase", "too late to stop anything")


def ctrl_c_in_a_reward(model: Path, folder: Path, straight: Path, fault: str) -> None:
    run = folder / "run"
    os.environ |= {"FAULT": fault, "FAULT_AT": "2"}
    stopped = train(flags(model, run), folder / "log", os.setpgrp)
    assert (stopped.code, status(run)["state"], status(run)["step"]) == (130, "stopped", 1), stopped.err
    del os.environ["FAULT"]
    resumed = train(stopped.resume_words, folder / "log")
    assert resumed.code == 0 and same(result(run), result(straight)), resumed.err


@pytest.mark.parametrize("fault", ["Ctrl-C in a pool", "Ctrl-C in a program"])
def test_ctrl_c_that_ends_a_reward_functions_processes_is_a_stop_not_a_failed_reward(
    fault, straight, warm, tiny_folder, tmp_path, tried
):
    warm(ctrl_c_in_a_reward, tiny_folder, tmp_path, straight, fault)
    tried("Ctrl-C while a reward's processes work", "saved and resumed bit by bit")


# --- two ranks ---------------------------------------------------------------------------------------------


def in_two_ranks(words: list[str], log: Path, before=lambda: None) -> tuple[Ended, Ended]:
    """Run launch/train.py as two ranks, like a launcher; call `before` in the second one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if number:
            before()

    if not (pid := os.fork()):
        code = 70
        try:
            code = train(words, log / "1", partial(rank, 1)).code
        finally:
            os._exit(code)
    first = train(words, log / "0", partial(rank, 0))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return first, Ended(code, *((log / "1" / name).read_text() for name in ("out", "err")))


def one_of_two_signalled(model: Path, folder: Path) -> None:
    straight, run = folder / "straight", folder / "run"
    complete = in_two_ranks(flags(model, straight), folder / "log")
    assert [ended.code for ended in complete] == [0, 0], complete[0].err + complete[1].err
    stopped = in_two_ranks(flags(model, run), folder / "log", partial(signal_at, "sample", 2, signal.SIGTERM))
    assert [ended.code for ended in stopped] == [75, 75], stopped[0].err + stopped[1].err
    assert status(run)["step"] == 1 and len(found_in(run)) == 1
    words = stopped[0].resume_words
    resumed = in_two_ranks(words, folder / "log")
    assert [ended.code for ended in resumed] == [0, 0], resumed[0].err + resumed[1].err
    assert same(result(run), result(straight))
    alone = train(["--resume_from_checkpoint", str(found_in(run)[0])], folder / "log")
    assert alone.code == 4 and "the number of ranks" in alone.err


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(warm, tiny_folder, tmp_path, tried):
    warm(one_of_two_signalled, tiny_folder, tmp_path)
    tried("signal in a phase", "stopped both ranks")


# --- what was said is not said again -----------------------------------------------------------------------


def warned_and_stopped(model: Path, folder: Path) -> None:
    words = flags(model, folder / "run", reward_funcs="correctness", num_steps=FLAT_STEPS + 2, beta=0, eval_limit=1)
    stopped = train(words, folder / "log", partial(signal_at, "sample", FLAT_STEPS + 1, signal.SIGTERM))
    assert stopped.code == 75 and flat_warnings(stopped) == 1, stopped.err
    resumed = train(["--resume_from_checkpoint", "auto", "--output_dir", str(folder / "run")], folder / "log")
    assert resumed.code == 0 and flat_warnings(resumed) == 0, resumed.out


def flat_warnings(ended: Ended) -> int:
    return (ended.out + ended.err).count(f"Warning: for {FLAT_STEPS} steps")


def test_a_resumed_run_does_not_repeat_that_its_rewards_are_flat(warm, tiny_folder, tmp_path, tried):
    warm(warned_and_stopped, tiny_folder, tmp_path)
    tried("a warning of a run that is resumed", "said once")
