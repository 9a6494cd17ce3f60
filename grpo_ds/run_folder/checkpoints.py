"""Checkpoints as files: written under a temporary name, hashed, flushed to the disk and only then renamed.

So a folder called checkpoint-N is complete, unless it was damaged later. Its MANIFEST.json shows damage: it lists every
file with its size and SHA-256, and has a hash of that list. A run may die at any moment; finished checkpoints stay.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo_ds.run_folder.lock import locked_by_another

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "MANIFEST.json"
# Suffixes of unfinished folders; `tidy` removes or restores those of a dead run.
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
READ_AT_ONCE = 1 << 22


def folder_of(run: Path, step: int) -> Path:
    """Path of checkpoint-N."""
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Return N of checkpoint-N; -1 for any other name."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def found_in(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first, complete or damaged."""
    folders = [path for path in run.iterdir() if path.is_dir() and step_of(path) >= 0] if run.is_dir() else []
    return sorted(folders, key=step_of, reverse=True)


def partial_of(run: Path, step: int) -> Path:
    """Path of the folder in which checkpoint-N is written before it is renamed."""
    return folder_of(run, step).with_suffix(PARTIAL)


def begin(partial: Path) -> None:
    """Make an empty folder to write into; `finish` turns it into the checkpoint."""
    tidy(partial.parent)
    partial.mkdir(parents=True)


def undo(partial: Path) -> None:
    """Remove what a failed save has left."""
    _discard(partial)
    tidy(partial.parent)


def why_not_written(run: Path, step: int, error: Exception) -> str:
    """Return the message for a checkpoint that could not be written."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    try:
        free = f"{shutil.disk_usage(run).free / 2**30:.1f} GiB are free there"
    except OSError:
        free = "the folder cannot be read"
    return (
        f"{folder_of(run, step).name} could not be written to {run} ({free}): {reason}\n"
        "Free some space, or lower --save_total_limit; the earlier checkpoints are complete."
    )


def finish(partial: Path) -> Path:
    """List and hash the files, flush all of them to the disk, and rename the folder to checkpoint-N."""
    files = {str(file.relative_to(partial)): _described(file) for file in _files(partial)}
    (partial / MANIFEST).write_text(_manifest(files), encoding="utf-8")
    for path in [*_files(partial), *(folder for folder in partial.rglob("*") if folder.is_dir()), partial]:
        _flush(path)
    final = partial.with_suffix("")
    if os.path.lexists(final):  # damaged, or written earlier in the same step
        final.rename(final.with_suffix(REPLACED))
    partial.rename(final)
    _flush(final.parent)
    _delete(final.with_suffix(REPLACED))
    return final


def damage(checkpoint: Path) -> str | None:
    """Return the damage of a checkpoint; None if every file is unchanged."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} has been changed"
        for name, wanted in files.items():
            if (file := checkpoint / name).stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {wanted['bytes']}"
        # All sizes first: they cost nothing, and hashing a gigabyte or two takes a second.
        changed = (name for name, wanted in files.items() if _sha256(checkpoint / name) != wanted["sha256"])
        return next((f"{name} has been changed" for name in changed), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def rotate(run: Path, limit: int | None, *, newest: int, best: int | None) -> None:
    """Keep the newest `limit` checkpoints up to step `newest`, the one just written, and the best; delete the others.

    Checkpoints after `newest` are from before the run was resumed; they are damaged or will be written again.
    """
    if limit is None:
        return
    for old in [checkpoint for checkpoint in found_in(run) if step_of(checkpoint) <= newest][limit:]:
        if step_of(old) != best:
            _delete(old)


def tidy(run: Path) -> None:
    """Finish or undo the unfinished changes of a dead run, or of a save that failed; a living run's are its own."""
    first = os.environ.get("RANK", "0") == "0"  # other ranks would see files that rank 0 is writing
    if first and locked_by_another(run):
        return
    for path in sorted(run.glob("checkpoint-*")):
        if path.suffix == REPLACED and not path.with_suffix("").exists():
            with suppress(OSError):  # another rank was faster, or the folder is read-only
                path.rename(path.with_suffix(""))
        elif first and path.suffix in (PARTIAL, REPLACED, DELETED) and NAME.fullmatch(path.stem):
            _discard(path)


@contextmanager
def renamed_into(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; its files and folders then replace those of the same name in `folder`.

    After an error nothing of it is left.
    """
    partial = folder / f"model{PARTIAL}"
    _discard(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            target = folder / path.name
            if path.is_dir():
                _discard(target)
            path.replace(target)
    finally:
        _discard(partial)


def _delete(folder: Path) -> None:
    """Rename the folder before deleting its files, so that it is never taken for a checkpoint."""
    with suppress(OSError):  # a folder that cannot be deleted does no harm
        _discard(folder if folder.suffix == REPLACED else folder.rename(folder.with_suffix(DELETED)))


def _discard(folder: Path) -> None:
    """Remove a folder and all that is in it, or a link to one, whose target stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _manifest(files: dict[str, dict[str, str | int]]) -> str:
    """Return the list of files as JSON, with a hash of the list on top, so that a changed bit in it is found too."""
    listed = json.dumps(files, indent=1, sort_keys=True)
    own = hashlib.sha256(listed.encode()).hexdigest()
    return f'{{"sha256": "{own}",\n"files": {listed}}}\n'


def _described(file: Path) -> dict[str, str | int]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Flush to the disk: after a power cut a file with a name but no content would look complete."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
