"""The folder of a run: that it can be written to is known before a model is loaded, and one run alone writes there."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from grpo_ds.errors import CheckpointError, UsageError

LOCK_FILE = ".lock"  # holds the number of the process that has it locked; the system lets go when that one dies
_taken: dict[Path, int] = {}  # folder -> the descriptor that holds the lock


def check_writable(folder: Path) -> None:
    """Raises UsageError where nothing can be written to `folder`, or it cannot be made; leaves nothing behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".grpo_ds-"):
            pass
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def take(folder: Path) -> None:
    """Make the folder, and keep other runs out of it until `release` or the end of this process. For the first rank.

    Raises CheckpointError where another run has it.
    """
    if folder.resolve() in _taken:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 20).decode(errors="replace").strip()
        os.close(lock)
        raise CheckpointError(
            f"{folder} belongs to a run that is alive (process {owner}); two would spoil each other's files.\n"
            "Wait for it, or stop it: on SIGTERM it saves and says how to go on."
        ) from None
    except OSError:  # a file system without locks
        os.close(lock)
        return
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    _taken[folder.resolve()] = lock


def release(folder: Path) -> None:
    if (lock := _taken.pop(folder.resolve(), None)) is not None:
        os.close(lock)


def cannot_be_written(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"--output_dir {folder} cannot be written to: {error.strerror} ({error.filename}).\n"
        "Name a folder on a disk with room that you may write to."
    )
