"""Checkpoints as files: written beside their place, hashed, flushed to the disk and only then renamed into it.

A folder called checkpoint-N is therefore whole or has been damaged since, and its MANIFEST.json says which: it names
every file with its size and SHA-256, and itself. Whatever moment a run dies at, what was finished before is left.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo_ds.errors import CheckpointError

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "MANIFEST.json"
# Endings of folders on their way; what dies with one of these is found by `tidy`.
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
READ_AT_ONCE = 1 << 22


def folder_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N; -1 of any other name."""
    found = NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def found_in(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whole or not."""
    folders = [path for path in run.iterdir() if path.is_dir() and step_of(path) >= 0] if run.is_dir() else []
    return sorted(folders, key=step_of, reverse=True)


def partial_of(run: Path, step: int) -> Path:
    """Where checkpoint-N is written before it is one."""
    return folder_of(run, step).with_suffix(PARTIAL)


def begin(partial: Path) -> None:
    """An empty folder to write into, which `finish` makes the checkpoint."""
    tidy(partial.parent)
    partial.mkdir(parents=True)


def remove(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)


def why_not_written(run: Path, step: int, error: Exception) -> str:
    """What a person reads when a checkpoint could not be written."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    try:
        free = f"{shutil.disk_usage(run).free / 2**30:.1f} GiB are free there"
    except OSError:
        free = "the folder cannot be looked at"
    return (
        f"{folder_of(run, step).name} could not be written to {run} ({free}): {reason}\n"
        "Make room, or lower --save_total_limit; what was saved before is whole."
    )


def finish(partial: Path) -> Path:
    """Name and hash what was written, flush all of it to the disk, and give it its name."""
    files = {str(file.relative_to(partial)): _described(file) for file in _files(partial)}
    (partial / MANIFEST).write_text(_manifest(files), encoding="utf-8")
    for path in [*_files(partial), *(folder for folder in partial.rglob("*") if folder.is_dir()), partial]:
        _flush(path)
    final = partial.with_suffix("")
    if final.exists():  # written before, and either damaged since or of an earlier moment of the same step
        final.rename(final.with_suffix(REPLACED))
    partial.rename(final)
    _flush(final.parent)
    _delete(final.with_suffix(REPLACED))
    return final


def damage(checkpoint: Path) -> str | None:
    """What is wrong with it; None where every file is there as it was written."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} has been changed"
        for name, wanted in files.items():
            if (file := checkpoint / name).stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {wanted['bytes']}"
        # Sizes first, all of them: they cost nothing, and hashing takes a second for a gigabyte or two.
        changed = (name for name, wanted in files.items() if _sha256(checkpoint / name) != wanted["sha256"])
        return next((f"{name} has been changed" for name in changed), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def to_resume(asked: str, run: Path | None) -> tuple[Path, list[str]]:
    """The checkpoint to go on from, and what to tell of damaged ones passed over.

    asked: "auto" (the newest whole one of `run`), a folder checkpoint-N (or the newest whole one before it), or a run.
    Raises CheckpointError where there is none: a run that was to be resumed never starts from the beginning.
    """
    named = None if asked == "auto" else Path(os.path.expanduser(asked))
    run = run_of(asked, run)
    if run is None:
        raise CheckpointError("--resume_from_checkpoint auto needs to know the run: add --output_dir FOLDER.")
    tidy(run)
    if named and not named.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {asked}: there is no such folder.{_others(run)}")
    newest = step_of(named) if named and step_of(named) >= 0 else math.inf
    candidates = [checkpoint for checkpoint in found_in(run) if step_of(checkpoint) <= newest]
    told: list[str] = []
    for candidate in candidates:
        if (wrong := damage(candidate)) is None:
            return candidate, told
        told.append(f"{candidate} is damaged: {wrong}")
    none = f"{run} holds no checkpoint" if not told else "No whole checkpoint is left"
    start = "To start from the beginning, leave --resume_from_checkpoint out and name another --output_dir."
    raise CheckpointError("\n".join([f"{none}, so nothing can be resumed.", *told[:3], start]))


def run_of(asked: str, run: Path | None) -> Path | None:
    """The folder in which --resume_from_checkpoint is looked for; `run` is --output_dir."""
    if asked == "auto":
        return run
    named = Path(os.path.expanduser(asked))
    return named.parent if step_of(named) >= 0 else named


def rotate(run: Path, limit: int | None, *, newest: int, best: int | None) -> None:
    """Delete all but `limit` checkpoints up to step `newest`, the one just written, and the best one.

    Later ones, of a run that was resumed before them, are damaged or will be written again.
    """
    if limit is None:
        return
    for old in [checkpoint for checkpoint in found_in(run) if step_of(checkpoint) <= newest][limit:]:
        if step_of(old) != best:
            _delete(old)


def tidy(run: Path) -> None:
    """Finish or undo what a run that died left half done."""
    first = os.environ.get("RANK", "0") == "0"  # the others look at files that this one may be writing
    for path in sorted(run.glob("checkpoint-*")):
        if path.suffix == REPLACED and not path.with_suffix("").exists():
            with suppress(OSError):  # another rank was quicker, or nothing can be written here
                path.rename(path.with_suffix(""))
        elif first and path.suffix in (PARTIAL, REPLACED, DELETED) and NAME.fullmatch(path.stem):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def renamed_into(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files and folders then take the place of those of the same name in `folder`."""
    partial = folder / f"model{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in sorted(partial.iterdir()):
        target = folder / path.name
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        path.replace(target)
    partial.rmdir()


def write_whole(file: Path, text: str) -> None:
    """A small file that is at every moment either the old one or the new one."""
    new = file.with_name(f".{file.name}.new")
    with new.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)


def _delete(folder: Path) -> None:
    """Not called a checkpoint any more before the first of its files goes."""
    with suppress(OSError):  # what cannot be deleted is in nobody's way
        going = folder if folder.suffix == REPLACED else folder.rename(folder.with_suffix(DELETED))
        shutil.rmtree(going, ignore_errors=True)


def _others(run: Path) -> str:
    there = ", ".join(path.name for path in found_in(run)[:5])
    return f" In {run} there are: {there}." if there else ""


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _manifest(files: dict[str, dict[str, str | int]]) -> str:
    """Its own hash on top, so that a changed bit in the list of files is found as well."""
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
    """To the disk itself: after a power cut the name must not be there without the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
