"""File operations of a process in a folder, counted one by one; any of them can be made to fail or to be the last.

Python calls audit hooks for every file that it opens, creates, renames or removes. torch and safetensors write to open
files without calling them; `no_file_over` limits these writes.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

IN_A_FOLDER = {"os.remove", "os.rmdir"}  # their path may be relative to an open folder
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"}


def before_each(folder: Path, act: Callable[[int, str, str], None], part: str = "") -> None:
    """Call act(number, operation, path) before every operation in `folder` on a path that contains `part`."""
    fsync, done = os.fsync, 0

    def on_event(operation: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if operation not in OPERATIONS:
            return
        path = str(arguments[0])
        if operation in IN_A_FOLDER and arguments[1] != -1:  # as shutil.rmtree deletes
            path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
        if path.startswith(str(folder)) and part in path:
            done += 1
            act(done, operation, path)

    def audited_fsync(descriptor: int) -> None:
        sys.audit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = audited_fsync
    sys.addaudithook(on_event)


def counted(folder: Path) -> list[str]:
    """Return a list that records the operations from now on."""
    operations: list[str] = []
    before_each(folder, lambda _, operation, path: operations.append(operation))
    return operations


def die_before(folder: Path, point: int) -> None:
    """Kill this process (kill -9) before operation number `point`."""

    def act(number: int, *_: object) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each(folder, act)


def fail(folder: Path, code: int, *, point: int | None = None, part: str = "") -> list[str]:
    """Make operation number `point` fail with an errno (None: all); return a list that records what failed."""
    failed: list[str] = []

    def act(number: int, operation: str, path: str) -> None:
        if point in (None, number):
            failed.append(f"{operation} {path}")
            raise OSError(code, os.strerror(code), path)

    before_each(folder, act, part)
    return failed


def no_file_over(size: int, *, deadly: bool) -> None:
    """Make a write fail (or kill the process, if deadly) as soon as its file has `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
