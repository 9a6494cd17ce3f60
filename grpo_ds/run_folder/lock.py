"""The lock on a run's folder, so that one run uses it at a time; and the check that it can be written to."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from grpo_ds.errors import CheckpointError, UsageError

LOCK_FILE = ".lock"  # holds the PID of the process that locks it; the system unlocks it when that process dies
_locked: dict[Path, int] = {}  # folder -> file descriptor that holds the lock


def check_writable(folder: Path) -> None:
    """Raise UsageError if `folder` cannot be made or written to; leaves nothing behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".grpo_ds-"):
            pass
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def lock(folder: Path) -> None:
    """Make the folder and keep other runs out of it until `release` or the end of this process; for rank 0.

    Raises CheckpointError if another run uses it.
    """
    if folder.resolve() in _locked:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise CheckpointError(
            f"{folder} is in use by a running process (PID {owner}); two runs would overwrite each other's files.\n"
            "Wait for it, or stop it: on SIGTERM it saves and prints how to resume."
        ) from None
    except OSError:  # the file system has no locks
        os.close(descriptor)
        return
    with suppress(OSError):  # on a full disk the lock still works
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    _locked[folder.resolve()] = descriptor


def release(folder: Path) -> None:
    """Let other runs use the folder."""
    if (descriptor := _locked.pop(folder.resolve(), None)) is not None:
        os.close(descriptor)


def cannot_be_written(folder: Path, error: OSError) -> UsageError:
    """Return the error for an output folder that refuses writing."""
    return UsageError(
        f"--output_dir {folder} cannot be written to: {error.strerror} ({error.filename}).\n"
        "Name a folder on a disk with free space that you may write to."
    )
