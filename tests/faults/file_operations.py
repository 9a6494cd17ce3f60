"""What a process does to the files of a folder, one operation after the other; any of them can fail or be the last.

Python tells audit hooks of every file it opens, makes, renames or removes. Writing within a file is torch's and
safetensors' own affair: `no_file_over` stops them there.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

IN_A_FOLDER = {"os.remove", "os.rmdir"}  # whose path may be relative to an open folder
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"}


def before_each(folder: Path, act: Callable[[int, str, str], None], part: str = "") -> None:
    """act(number, operation, path) before every operation of this process in `folder`, on paths with `part` in them."""
    fsync, done = os.fsync, 0

    def heard(operation: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if operation not in OPERATIONS:
            return
        path = str(arguments[0])
        if operation in IN_A_FOLDER and arguments[1] != -1:  # as shutil.rmtree deletes
            path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
        if path.startswith(str(folder)) and part in path:
            done += 1
            act(done, operation, path)

    def told(descriptor: int) -> None:
        sys.audit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = told
    sys.addaudithook(heard)


def counted(folder: Path) -> list[str]:
    """The operations from here on, as they come."""
    operations: list[str] = []
    before_each(folder, lambda _, operation, path: operations.append(operation))
    return operations


def die_before(folder: Path, point: int) -> None:
    """The operation number `point` is never made: kill -9, and nothing is cleaned up."""

    def act(number: int, *_: object) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each(folder, act)


def fail(folder: Path, code: int, *, point: int | None = None, part: str = "") -> list[str]:
    """The operation number `point` fails with an errno, or all do; what the answer holds has failed."""
    failed: list[str] = []

    def act(number: int, operation: str, path: str) -> None:
        if point in (None, number):
            failed.append(f"{operation} {path}")
            raise OSError(code, os.strerror(code), path)

    before_each(folder, act, part)
    return failed


def no_file_over(size: int, *, deadly: bool) -> None:
    """A write that makes a file larger than `size` bytes fails after its first part, or kills the process there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
