"""The lock on a run's folder, so that one run uses it at a time; and the check that it can be written to.

The lock belongs to the process named in it: a child that a reward function forks has none of it, so that it is free as
soon as that process ends, however it ends (https://man7.org/linux/man-pages/man2/flock.2.html).
"""

import fcntl
import json
import os
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo_ds.errors import CheckpointError, UsageError
from grpo_ds.run_folder.files import ENVIRONMENT_FILE, HELD_OUT_FILE
from grpo_ds.run_folder.status import STATUS_FILE
from grpo_ds.run_folder.trained_on import TRAINED_ON_FILE
from grpo_ds.settings.saved_config import CONFIG_FILE

LOCK_FILE = ".lock"  # holds the PID of the process that locks it; the system unlocks it when that process dies
# What a run writes before its first step.
BEFORE_STEPS = {CONFIG_FILE, TRAINED_ON_FILE, ENVIRONMENT_FILE, STATUS_FILE, HELD_OUT_FILE}
PROBE = ".grpo_ds-"  # beginning of the name of a folder that `check_writable` makes for a moment


@dataclass(frozen=True, slots=True)
class Held:
    """A lock of this process."""

    descriptor: int  # of the lock file
    made: list[Path]  # folders that were made for it, the innermost first


_held: dict[Path, Held] = {}


class FolderTaken(UsageError):
    """A folder that holds another run's files."""


def check_writable(folder: Path) -> None:
    """Raise UsageError if `folder` cannot be made or written to; leaves nothing behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=PROBE):
            pass
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def lock_new(folder: Path) -> None:
    """Lock a folder that is new or empty, in one act: no other run can take it between check and use.

    Raises FolderTaken if it holds files, otherwise as `lock` does.
    """
    _refuse_files(folder)  # before anything is written
    lock(folder)
    try:
        _refuse_files(folder)  # of a run that ended here in the meantime
    except FolderTaken:
        release()
        raise


def lock(folder: Path, *, tries: int = 3) -> None:
    """Make the folder and keep other runs out of it until `release` or the end of this process; for rank 0.

    Raises CheckpointError if another run uses it, UsageError if it cannot be written to.
    """
    if (real := folder.resolve()) in _held:
        return
    file, missing = real / LOCK_FILE, [path for path in (real, *real.parents) if not os.path.exists(path)]
    try:
        real.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        _remove_empty(missing)
        raise cannot_be_written(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise CheckpointError(
            f"{folder} is in use by a running process (PID {owner}); two runs would overwrite each other's files.\n"
            "Wait for it, or stop it: on SIGTERM it saves and prints how to resume."
        ) from None
    except OSError:  # the file system has no locks
        pass
    if tries and not _is_open_as(descriptor, file):  # its owner released it after we had opened it
        os.close(descriptor)
        return lock(folder, tries=tries - 1)
    with suppress(OSError):  # on a full disk the lock still works
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
    _held[real] = Held(descriptor, missing)


def release() -> None:
    """Let other runs use what this process has locked. Removes folders that were made for it and are empty still."""
    for folder in [*_held]:
        held, file = _held.pop(folder), folder / LOCK_FILE
        with suppress(OSError):
            if _is_open_as(held.descriptor, file):  # not another run's, in a new folder of this name
                file.unlink()
        with suppress(OSError):  # users' code may have closed it
            os.close(held.descriptor)
        _remove_empty(held.made)


def locked_by_another(folder: Path) -> bool:
    """True if another process uses the folder."""
    if folder.resolve() in _held:
        return False
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        pass
    return False


def cannot_be_written(folder: Path, error: OSError) -> UsageError:
    """Return the error for an output folder that refuses writing."""
    return UsageError(
        f"--output_dir {folder} cannot be written to: {error.strerror} ({error.filename}).\n"
        "Name a folder on a disk with free space that you may write to."
    )


def _refuse_files(folder: Path) -> None:
    """Raise FolderTaken for a folder with files, and for a file or a dangling link of its name.

    What a run leaves that ended before its first step is not among them: the next run writes all of it anew.
    """
    try:
        names = os.listdir(folder) if os.path.lexists(folder) else []
    except (NotADirectoryError, FileNotFoundError):
        names = [folder.name]
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    files = {name for name in names if name != LOCK_FILE and not name.startswith(PROBE)}
    if files and not _never_began(folder, files):
        raise FolderTaken(
            f"--output_dir {folder} already holds files, and a run is never overwritten.\n"
            "Name another folder, or delete this one."
        )


def _never_began(folder: Path, files: set[str]) -> bool:
    """True if these are only files that a run writes before its first step, and its status says that it did none."""
    if STATUS_FILE not in files or not files <= BEFORE_STEPS:
        return False
    try:
        status = json.loads((folder / STATUS_FILE).read_bytes())
        return status["state"] in ("evaluating", "failed") and not status.get("step") and "checkpoint" not in status
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _remove_empty(folders: list[Path]) -> None:
    """Remove those that are empty, in this order."""
    for folder in folders:
        with suppress(OSError):  # not empty, or gone
            folder.rmdir()


def _is_open_as(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def _forget() -> None:
    """Close the descriptors that a fork has inherited; each would keep the folder locked when its owner is dead."""
    for held in _held.values():
        with suppress(OSError):  # users' code may have closed it
            os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
