"""A process that is killed or runs out of disk space at any moment of a save: finished checkpoints are found again,
unfinished ones are not."""

import errno
import io
import json
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grpo_ds.errors import CheckpointError, GrpoError
from grpo_ds.run_folder.checkpoints import damage, found_in, step_of
from grpo_ds.run_folder.resume import to_resume
from grpo_ds.training.checkpoint import save_checkpoint
from grpo_ds.training.run import Run
from tests.faults.file_operations import before_each, counted, die_before, fail, no_file_over
from tests.faults.forks import fork, join_fake_ranks
from tests.training.test_resume import finish, make_run

KIND = "offload, int8 reference"
# Name -> --save_total_limit, and the steps whose checkpoints may be left when the second save is interrupted.
SITUATIONS = {
    "beside the one before": (None, [[1], [1, 2]]),
    "while the one before is deleted": (1, [[1], [1, 2], [2]]),
    "in place of one of the same step": (1, [[2]]),
}
RARE = ("os.mkdir", "os.rename", "os.rmdir")  # each of these is tried; of the others every EVERY-th
EVERY = 8
SIZES = (1, 900, 20_000, 100_000, 250_000)  # bytes; writing a file stops at this size

Line = dict[str, Any]


def at_step_2(model: Path, folder: Path, then: Callable[[Run], None]) -> tuple[list[Line], dict[str, torch.Tensor]]:
    """Result of a run that has checkpoint-1 and, before it saves the second one, calls `then` (which forks)."""
    join_fake_ranks()
    run = make_run(model, KIND, folder / "straight")
    run.config = run.trainer.config = replace(run.config, save_steps=1)
    save = run.save_checkpoint

    def save_checkpoint() -> None:
        if run.progress.global_step == 2:
            then(run)
        save()

    run.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    return finish(run)


def moved(run: Run, there: Path, limit: int | None = None) -> Run:
    """Let the run of a fork continue in a copy of its folder."""
    run.folder = run.status.folder = there
    run.config = run.trainer.config = replace(run.config, save_total_limit=limit)
    return run


def is_the_run(straight: tuple, model: Path, run: Path) -> None:
    """Assert that this run, resumed, ends like the uninterrupted one."""
    metrics, weights = straight
    origin, warnings = to_resume("auto", run)
    assert not warnings
    again, state = finish(make_run(model, KIND, run, origin))
    assert again == metrics
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def steps(run: Path) -> list[int]:
    return sorted(map(step_of, found_in(run)))


def debris(run: Path) -> list[str]:
    return [path.name for path in run.glob("*checkpoint*") if step_of(path) < 0]


# --- kill -9 -----------------------------------------------------------------------------------------------


def killed_while_saving(model: Path, folder: Path) -> list[str]:
    """Kill a save at many points, check each result, and return the operation before which each process died."""
    died: list[str] = []
    resumable: dict[tuple, Path] = {}  # (situation, steps that are left) -> one folder of it

    def deaths(run: Run) -> None:
        for situation, (limit, left) in SITUATIONS.items():
            base = folder / situation / "base"
            shutil.copytree(run.folder, base)
            if left == [[2]]:
                assert fork(partial(save, run, base, limit))[0] == 0
            again = shutil.copytree(base, base.with_name("counted"))
            operations = fork(partial(counted_save, run, again, limit))[1]
            points = [i + 1 for i, name in enumerate(operations) if name in RARE or i % EVERY == 0]
            for point in points:
                there = shutil.copytree(base, base.with_name(f"point {point}"))
                code, _ = fork(partial(dying_save, run, there, limit, partial(die_before, there, point)))
                assert code == -signal.SIGKILL
                check(run, there, limit, left, situation)
                died.append(operations[point - 1])
            for size in SIZES if limit is None else ():
                there = shutil.copytree(base, base.with_name(f"size {size}"))
                code, _ = fork(partial(dying_save, run, there, limit, partial(no_file_over, size, deadly=True)))
                assert code == -signal.SIGXFSZ
                check(run, there, limit, left, situation)
                died.append("write")

    def check(run: Run, there: Path, limit: int | None, left: list[list[int]], situation: str) -> None:
        origin, warnings = to_resume("auto", there)
        assert not warnings and origin == found_in(there)[0]
        assert steps(there) in left and all(damage(checkpoint) is None for checkpoint in found_in(there))
        assert not debris(there)
        if (key := (situation, *steps(there))) not in resumable:
            resumable[key] = shutil.copytree(there, folder / "resumable" / str(len(resumable)))
        assert fork(partial(save, run, there, limit))[0] == 0
        assert steps(there) == left[-1] and damage(found_in(there)[0]) is None and not debris(there)
        shutil.rmtree(there)

    straight = at_step_2(model, folder, deaths)
    assert {key[1:] for key in resumable} == {(1,), (1, 2), (2,)}
    for there in resumable.values():
        code, failure = fork(partial(is_the_run, straight, model, there))
        assert code == 0, failure
    return died


def save(run: Run, there: Path, limit: int | None = None) -> None:
    save_checkpoint(moved(run, there, limit).trainer, there)


def counted_save(run: Run, there: Path, limit: int | None) -> list[str]:
    operations = counted(there)
    save(run, there, limit)
    return operations


def dying_save(run: Run, there: Path, limit: int | None, doom: Callable[[], None]) -> None:
    doom()
    save(run, there, limit)


def test_killed_at_any_moment_of_a_save_no_finished_checkpoint_is_lost(warm, tiny_folder, tmp_path, tried):
    died = warm(killed_while_saving, tiny_folder, tmp_path)
    assert len(died) >= 40 and {*RARE, "open", "fsync", "os.remove", "write"} <= set(died)
    for _ in died:
        tried("kill -9 while saving", "survived")


# --- a power cut -------------------------------------------------------------------------------------------


def flushed_before_renamed(model: Path, folder: Path) -> None:
    events: list[tuple[str, str]] = []

    def listen(run: Run) -> None:
        there = shutil.copytree(run.folder, folder / "power")
        before_each(there, lambda _, operation, path: events.append((operation, path)))
        save(run, there)
        partial_path, final = str(there / "checkpoint-2.partial"), there / "checkpoint-2"
        renamed = events.index(("os.rename", partial_path))
        flushed = {path for operation, path in events[:renamed] if operation == "fsync"}
        written = {partial_path, *(f"{partial_path}/{path.relative_to(final)}" for path in final.rglob("*"))}
        assert written <= flushed, f"not flushed before the rename: {written - flushed}"
        assert ("fsync", str(there)) in events[renamed:]
        raise SystemExit

    at_step_2(model, folder, lambda run: assert_in_fork(partial(listen, run)))


def assert_in_fork(run: Callable[[], None]) -> None:
    code, failure = fork(run)
    assert code == 0, failure


def test_before_a_power_cut_every_file_and_folder_is_flushed_and_only_then_renamed(warm, tiny_folder, tmp_path, tried):
    warm(flushed_before_renamed, tiny_folder, tmp_path)
    tried("power cut while saving", "flushed before renamed")


# --- no room, or nowhere to write --------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def full_while_saving(model: Path, folder: Path) -> dict[str, int]:
    """Make saves fail at many points, check each result, and return how many ended in which way."""
    counts: Counter[str] = Counter()

    def attempts(run: Run) -> None:
        again = shutil.copytree(run.folder, folder / "counted")
        operations = fork(partial(counted_save, run, again, 1))[1]
        points = [i + 1 for i, name in enumerate(operations) if name in RARE or i % EVERY == 0]
        for point in points:
            there = shutil.copytree(run.folder, folder / f"point {point}")
            code, outcome = fork(partial(periodic, run, there, partial(fail, there, ERRORS[point % 4], point=point)))
            assert code == 0, f"{operations[point - 1]} failed: {outcome}"
            counts[outcome] += 1
        for size in SIZES:
            there = shutil.copytree(run.folder, folder / f"size {size}")
            code, outcome = fork(partial(periodic, run, there, partial(no_file_over, size, deadly=False)))
            assert code == 0, outcome
            counts[outcome] += 1
        for i, part in enumerate(("partial", "MANIFEST", "rank0.pt", "trainer_state.json")):
            there = shutil.copytree(run.folder, folder / f"signal {i}")
            code, outcome = fork(partial(at_a_signal, run, there, part))
            assert code == CheckpointError.exit_code, outcome
            status = json.loads((there / "run_status.json").read_text())
            assert status["state"] == "failed" and status["exit_code"] == 4 and "No space" in status["message"]
            assert to_resume("auto", there) == (there / "checkpoint-1", [])
            counts["stopped with exit 4"] += 1
        for i, part in enumerate(("metrics.jsonl", "run_status.json")):
            there = shutil.copytree(run.folder, folder / f"end {i}")
            code, outcome = fork(partial(to_the_end, run, there, part))
            assert code == 0, outcome
            counts["warned once, and went on"] += 1

    at_step_2(model, folder, attempts)
    return counts


def periodic(run: Run, there: Path, trouble: Callable[[], list[str] | None]) -> str:
    """Save in the middle of a run, with trouble, and again when there is disk space."""
    messages: list[str] = []
    moved(run, there, 1).console.line = messages.append  # type: ignore[method-assign]
    failed = trouble()
    Run.save_checkpoint(run)
    no_file_over(resource.RLIM_INFINITY, deadly=False)
    assert failed is None or len(failed) == 1
    if messages:  # else a deletion failed, which is not urgent
        assert "Warning: checkpoint-2 could not be written" in messages[0] and "GiB are free" in messages[0]
        assert steps(there)[0] == 1 and damage(there / "checkpoint-1") is None
    else:
        assert damage(there / "checkpoint-2") is None
    Run.save_checkpoint(run)
    assert damage(there / "checkpoint-2") is None
    assert len(messages) < 2
    save_checkpoint(run.trainer, there)
    assert steps(there) == [2] and not debris(there)
    return "warned by name, and went on" if messages else "went on"


def at_a_signal(run: Run, there: Path, part: str) -> None:
    moved(run, there).trainer.interruption.signum = signal.SIGTERM
    fail(there / "checkpoint-2.partial", errno.ENOSPC, part=part)
    leaving(run)


def to_the_end(run: Run, there: Path, part: str) -> None:
    errors = io.StringIO()
    del run.save_checkpoint
    fail(there, errno.ENOSPC, part=part)
    with redirect_stderr(errors):
        leaving(moved(run, there))
    assert errors.getvalue().count(f"{part} could not be written (No space left on device)") == 1
    assert damage(there / "checkpoint-4") is None


def leaving(run: Run) -> None:
    """Run to the end, and exit like run_script."""
    try:
        run.run()
    except GrpoError as error:
        print(error)
        sys.exit(error.exit_code)


def test_when_nothing_can_be_written_a_run_says_so_and_keeps_what_it_has(warm, tiny_folder, tmp_path, tried):
    for outcome, count in warm(full_while_saving, tiny_folder, tmp_path).items():
        for _ in range(count):
            tried("disk full or read-only", outcome)
