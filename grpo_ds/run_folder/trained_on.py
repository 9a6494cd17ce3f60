"""trained_on.txt beside a model: which questions it was trained on, by this run and by the runs that it started from.

A fingerprint (task/questions.py) of each question of the training part on a line, sorted: 13 bytes a question, so
2.6 MB for 200,000.
"""

import re
from collections.abc import Collection
from pathlib import Path

from grpo_ds.errors import UsageError
from grpo_ds.system.files import write_whole

TRAINED_ON_FILE = "trained_on.txt"
FINGERPRINTS = re.compile(r"([0-9a-f]{12}\n)*")


def write_trained_on(folder: Path, fingerprints: Collection[str]) -> None:
    """Write trained_on.txt."""
    write_whole(folder / TRAINED_ON_FILE, "".join(f"{each}\n" for each in sorted(set(fingerprints))))


def read_trained_on(model: Path) -> frozenset[str] | None:
    """Return the fingerprints beside a model, None if it has no such file. Raises UsageError for a damaged file."""
    file = model / TRAINED_ON_FILE
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, ValueError):
        text = "unreadable"
    if not FINGERPRINTS.fullmatch(text):
        raise UsageError(
            f"{file} is damaged, so questions that the model was trained on could be taken for held-out ones.\n"
            "Restore it from a checkpoint of that run, or delete it to go on without."
        )
    return frozenset(text.split())
