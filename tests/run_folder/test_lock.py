"""The lock on a run's folder: checked and taken in one act, of one process, and gone with it. Real processes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from grpo_ds.commands.train import lock_first
from grpo_ds.errors import MAX_LINES, CheckpointError, UsageError
from grpo_ds.run_folder.checkpoints import tidy
from grpo_ds.run_folder.lock import LOCK_FILE, FolderTaken, _held, lock, lock_new, locked_by_another, release

pytestmark = pytest.mark.faults("two runs and one folder")

# Another process: it locks the folder of its argument, does what is inserted, says so, and waits.
ANOTHER = """
import sys, time
from pathlib import Path
from grpo_ds.run_folder.lock import lock_new, release
folder = Path(sys.argv[1])
lock_new(folder)
{then}
print("ready", flush=True)
time.sleep(600)
"""
FORKS = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import getpid

pool = ProcessPoolExecutor(1, mp_context=get_context("fork"))
print(pool.submit(getpid).result(), flush=True)
"""


@pytest.fixture(autouse=True)
def released():
    yield
    release()


@pytest.fixture
def another():
    """Start another process, and return it once it is ready."""
    started = []

    def start(folder, then=""):
        process = subprocess.Popen(
            [sys.executable, "-c", ANOTHER.format(then=then), str(folder)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        process.said = list(iter(process.stdout.readline, "ready\n"))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_folder_that_another_process_has_locked_is_refused_with_its_pid(tmp_path, another):
    process = another(tmp_path / "run")
    named = rf"in use by a running process \(PID {process.pid} on \S+\)"
    for take in (lock, lock_new):
        with pytest.raises(CheckpointError, match=named) as error:
            take(tmp_path / "run")
        assert len(str(error.value).splitlines()) <= MAX_LINES
    assert locked_by_another(tmp_path / "run")


def test_a_lock_whose_descriptor_was_closed_is_released_without_an_error(tmp_path):
    """As by a reward function that calls os.closerange(3, 256)."""
    lock(tmp_path / "run")
    os.close(_held[tmp_path / "run"].descriptor)
    release()
    lock(tmp_path / "run")


def test_a_child_that_outlives_its_killed_owner_does_not_hold_the_lock(tmp_path, another):
    """As a reward function's ProcessPoolExecutor does when the trainer is killed with -9."""
    process = another(tmp_path / "run", FORKS)
    (child,) = map(int, process.said)
    process.kill()
    process.wait()
    try:
        os.kill(child, 0)  # it lives
        lock_new(tmp_path / "run")  # although the killed run's lock file is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_run_that_ended_between_check_and_lock_is_not_overwritten(tmp_path, another, monkeypatch):
    folder, listdir = tmp_path / "run", os.listdir
    folder.mkdir()

    def then_another_run_ends_there(path):
        names = listdir(path)
        monkeypatch.setattr(os, "listdir", listdir)
        (folder / "model.safetensors").write_text("of another run")
        return names

    monkeypatch.setattr(os, "listdir", then_another_run_ends_there)
    with pytest.raises(FolderTaken, match="already holds files"):
        lock_new(folder)
    assert os.listdir(folder) == ["model.safetensors"] and not locked_by_another(folder)


def test_released_before_anything_was_written_it_leaves_what_was_there_before(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "outputs/run"):
        lock_new(tmp_path / folder)
        assert (tmp_path / folder / LOCK_FILE).is_file()
        release()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine"]


def test_released_with_files_it_leaves_them(tmp_path):
    lock_new(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    release()
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]
    with pytest.raises(FolderTaken):
        lock_new(tmp_path / "run")


BEGUN = [  # status, other files, True if the folder is free
    ({"state": "failed", "max_steps": 9, "exit_code": 7}, [], True),
    ({"state": "failed", "step": 0}, ["held_out.json", "grpo_config.yaml", "trained_on.txt", "environment.json"], True),
    ({"state": "evaluating", "step": 0}, ["held_out.json"], True),  # killed before the first step
    ({"state": "failed", "step": 1}, ["held_out.json"], False),
    ({"state": "failed", "step": 0, "checkpoint": "checkpoint-0"}, [], False),
    ({"state": "failed", "step": 0}, ["metrics.jsonl"], False),
    ({"state": "failed", "step": 0}, ["notes.txt"], False),  # the user's
    ({"state": "done", "step": 0}, [], False),
    (["failed"], [], False),
    (None, ["grpo_config.yaml"], False),
]


@pytest.mark.parametrize(("status", "others", "free"), BEGUN)
def test_a_run_that_began_no_step_does_not_take_its_folder(tmp_path, status, others, free):
    for name in others:
        (tmp_path / name).write_text("")
    if status is not None:
        (tmp_path / "run_status.json").write_text(json.dumps(status))
    with nullcontext() if free else pytest.raises(FolderTaken):
        lock_new(tmp_path)


def test_the_lock_of_another_run_in_a_new_folder_of_the_same_name_stays(tmp_path, another):
    lock_new(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    another(tmp_path / "run")
    release()
    assert locked_by_another(tmp_path / "run")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, another):
    first = tmp_path / "outputs" / "model-20260101-000000"
    another(first)
    assert lock_first(first) == first.with_name(f"{first.name}-2")
    (tmp_path / "outputs" / f"{first.name}-3").mkdir()
    (tmp_path / "outputs" / f"{first.name}-3" / "summary.json").write_text("{}")
    another(first.with_name(f"{first.name}-4"))
    release()
    another(first.with_name(f"{first.name}-2"))
    assert lock_first(first) == first.with_name(f"{first.name}-5")


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match="cannot be written to"):
        lock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_where_no_lock_file_can_be_made_nothing_is_left(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(UsageError, match=re.escape("No space left on device")):
        lock_new(tmp_path / "outputs" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_living_runs_unfinished_files_are_left_alone(tmp_path, another):
    process = another(tmp_path, "(folder / 'checkpoint-3.partial').mkdir()")
    tidy(tmp_path)  # as a run does that branches from one of its checkpoints
    assert (tmp_path / "checkpoint-3.partial").is_dir()
    process.kill()
    process.wait()
    tidy(tmp_path)
    assert not (tmp_path / "checkpoint-3.partial").exists()
