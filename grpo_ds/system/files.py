"""Files written beside and renamed: a reader, and a run that resumes, finds the old content or the new one, complete.

A symbolic link at the file's place is replaced, never followed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced(file: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write into; it takes the place of `file` once it is flushed to the disk.

    After an error nothing has changed and nothing is left. Raises OSError.
    """
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)  # of a process that was killed, or somebody's link
    try:
        with new.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """Replace a file in one step. Raises OSError."""
    with replaced(file) as out:
        out.write(text.encode())


def give_folders_mode(folder: Path) -> None:
    """Let everybody read the weights who may read their new folder: safetensors lets only their owner."""
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


def append_whole(file: Path, text: str) -> None:
    """Append all of `text` or, on a full disk, nothing: a line that was cut would spoil the next one, too.

    Raises OSError, also for a symbolic link.
    """
    with open(file, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)) as out:
        size = out.seek(0, os.SEEK_END)
        try:
            left = memoryview(text.encode())
            while left:
                left = left[out.write(left) :]
        except OSError:
            out.truncate(size)
            raise
