"""Paths among the settings: absolute as soon as they are read, `~` expanded.

So a reward function that changes the working folder moves no file of the run, and a saved config means the same
everywhere.
"""

import os
from collections.abc import Callable
from pathlib import Path

from grpo_ds.errors import UsageError


def absolute(text: str) -> str:
    """Return the path from the root; "" names nothing. Raises UsageError without a home or a working folder."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UsageError(f"{text[:80]}: no such user's home folder. For a folder of that name write ./{text[:80]}")
    try:
        full = Path(expanded).absolute()
    except FileNotFoundError:
        raise UsageError("The working folder no longer exists: change to another (cd), and start again.") from None
    path = os.path.realpath(full) if ".." in full.parts else str(full)  # `..` of a link is its target's
    # No saved config could hold a working folder whose name has a line break, or bytes that are no text.
    return path if text and (path.isprintable() or not text.isprintable()) else text


def absolute_unless(*words: str) -> Callable[[str], str]:
    """Return a reader of paths that leaves these words alone."""
    return lambda text: text if text in words else absolute(text)


def absolute_if_there(*words: str) -> Callable[[str], str]:
    """Return a reader of texts that are paths if something is there, otherwise names, such as a hub id."""

    def read(text: str) -> str:
        path = absolute(text)
        return path if os.path.exists(path) and text not in words else text

    return read


def absolute_reward_files(text: str) -> str:
    """Return --reward_funcs with an absolute FILE.py in each FILE.py:FUNCTION."""
    return ",".join(map(_absolute_reward_file, text.split(",")))


def _absolute_reward_file(entry: str) -> str:
    file, _, name = entry.rpartition(":")
    path = absolute(file.strip())
    return f"{path}:{name}" if file and "," not in path else entry  # a comma would make two entries of it
