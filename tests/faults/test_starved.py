"""Out of memory in any phase, or a reward function that fails: a named error with its exit code, and completed steps
are saved, never half a step."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_ds.memory.phases import Profiler
from grpo_ds.run_folder.checkpoints import damage, found_in, step_of
from grpo_ds.training.engine import Engine
from tests.faults.launched import flags, result, same, status, train

RAM_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)
ERRORS: list[Callable[[], Exception]] = [
    MemoryError,
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    lambda: RuntimeError(RAM_FULL),
]
# (phase, how often it was completed before, steps that are kept); None: there is no run yet.
PHASES = [
    ("load", 0, None),
    ("initialise", 0, None),
    ("evaluate", 0, 0),
    ("reference", 0, 0),
    ("floor", 0, 0),
    ("sample", 0, 0),
    ("sample", 1, 1),
    ("reference", 2, 1),  # making the reference counts
    ("update", 0, 0),
    ("update", 1, 1),
    ("update", 2, 2),
    ("evaluate", 1, 3),
]
HALF_DONE = [("step", 2), ("save", 1)]  # with checkpoint-1 there already


def starve(phase: str, passed: int, error: Callable[[], Exception]) -> None:
    """Run out of memory at the end of a phase; in an update, after a backward and before the step."""
    enter, times = Profiler.phase, 0

    @contextmanager
    def watched(self: Profiler, name: str) -> Iterator[None]:
        nonlocal times
        with enter(self, name):
            yield
            times += name == phase
            if name == phase and times == passed + 1:
                raise error()

    if phase != "update":
        Profiler.phase = watched  # type: ignore[method-assign]
        return
    backward = Engine.backward

    def half(self: Engine, *arguments: Any, **options: Any) -> None:
        nonlocal times
        backward(self, *arguments, **options)
        times += 1
        if times == passed + 1:
            raise error()

    Engine.backward = half  # type: ignore[method-assign]


def starved(model: Path, folder: Path, straight: Path, moment: tuple, error: int) -> None:
    phase, passed, step = moment
    run = folder / "run"
    ended = train(flags(model, run), folder / "log", partial(starve, phase, passed, ERRORS[error]))
    assert ended.code == 5, ended.err
    assert f"in phase '{phase}'" in ended.err and "Traceback" not in ended.err
    assert f"Out of {'GPU memory' if error == 1 else 'RAM'} in phase" in ended.err
    if step is None:
        assert not run.exists()
        return
    now = status(run)
    assert (now["state"], now["exit_code"], now["step"]) == ("failed", 5, step)
    assert list(map(step_of, found_in(run))) == ([step] if step else [])  # at step 0 there is nothing to keep
    if step:
        again = train(ended.resume_words, folder / "log")
        assert again.code == 0, again.err
        assert same(result(run), result(straight))


@pytest.mark.parametrize(("number", "moment"), enumerate(PHASES), ids=str)
def test_out_of_memory_in_any_phase_is_named_and_the_steps_before_it_are_kept(
    number, moment, warm, tiny_folder, tmp_path, straight, tried
):
    warm(starved, tiny_folder, tmp_path, straight, moment, number % 3)
    tried("out of memory in a phase", "saved and resumed bit by bit" if moment[-1] else "named, nothing to save")


def starved_half_way(model: Path, folder: Path, straight: Path, phase: str, passed: int) -> None:
    run = folder / "run"
    words = flags(model, run, save_steps=1)
    ended = train(words, folder / "log", partial(starve, phase, passed, ERRORS[passed]))
    assert ended.code == 5, ended.err
    kept = found_in(run)
    assert all(damage(checkpoint) is None for checkpoint in kept) and step_of(kept[0]) == 2
    assert [path.name for path in run.glob("checkpoint-*") if step_of(path) < 0] == []
    again = train(["--resume_from_checkpoint", "auto", "--output_dir", str(run)], folder / "log")
    assert again.code == 0, again.err
    assert same(result(run), result(straight))


@pytest.mark.parametrize(("phase", "passed"), HALF_DONE)
def test_half_a_step_or_half_a_save_is_never_kept(phase, passed, warm, tiny_folder, tmp_path, straight, tried):
    warm(starved_half_way, tiny_folder, tmp_path, straight, phase, passed)
    tried("out of memory in a phase", "not saved; resumed from the step before")


def faulty_reward(model: Path, folder: Path, straight: Path, fault: str, expected: str) -> None:
    run = folder / "run"

    def set_fault() -> None:
        os.environ |= {"FAULT": fault, "FAULT_AT": "3"}

    ended = train(flags(model, run, reward_timeout=1), folder / "log", set_fault)
    assert ended.code == 7, ended.err
    assert expected in ended.err and "'faulty'" in ended.err and "Traceback" not in ended.err
    assert (status(run)["state"], status(run)["exit_code"], status(run)["step"]) == ("failed", 7, 2)
    assert ended.resume_words[-1] in status(run)["resume"]
    again = train(ended.resume_words, folder / "log")  # fixed: FAULT is not set
    assert again.code == 0, again.err
    assert same(result(run), result(straight))


FAULTS = {
    "raises": "KeyError: 'a column that is not there'",
    "hangs": "took longer than the 1 seconds",
    "is short": "returned 5 values for 6 completions",
    "ends the process": "SystemExit: 3",
    "is cancelled": "CancelledError: by a library",
    "raises no Exception": "NoException: of its own",
    "raises KeyboardInterrupt": "KeyboardInterrupt: of a worker",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_function_that_fails_at_step_3_costs_no_step(fault, warm, tiny_folder, tmp_path, straight, tried):
    warm(faulty_reward, tiny_folder, tmp_path, straight, fault, FAULTS[fault])
    tried("reward function that fails", "named, saved, fixed, resumed bit by bit")
