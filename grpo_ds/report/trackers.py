"""Destinations of metrics: always metrics.jsonl, and the trackers that --report_to names.

A failing tracker loses only its own figures: one warning is printed, and training continues.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from grpo_ds.errors import UsageError, one_error
from grpo_ds.report.run_files import completion_step, read_json
from grpo_ds.run_folder.files import COMPLETIONS_FILE, ENVIRONMENT_FILE, METRICS_FILE, SUMMARY_FILE
from grpo_ds.run_folder.progress import Progress, strict
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system.files import append_whole, replaced, write_whole
from grpo_ds.terminal import escape_control_chars


class Tracker(Protocol):
    """Receives the metrics of every step, its completions with --log_completions, and the summary at the end."""

    name: str

    def log(self, metrics: dict[str, float], *, step: int) -> None: ...
    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None: ...
    def finish(self, summary: dict[str, Any]) -> str:
        """Log the end of a complete run; return the command or URL that shows it, or ""."""
        ...


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_whole(folder / SUMMARY_FILE, json.dumps(strict(summary), indent=1) + "\n")


class JsonLines:
    """Write one JSON object per step, on disk before the next step begins, or as soon as the disk has space.

    history: the lines of a resumed run, which are written first.
    """

    name = METRICS_FILE

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]] = ()) -> None:
        self.path, self.texts, self._warned = folder / METRICS_FILE, folder / COMPLETIONS_FILE, False
        self._unwritten = ""  # lines for which the disk was too full
        if self.path.exists() or history:
            with self._at_most_a_warning():
                write_whole(self.path, "".join(json.dumps(line) + "\n" for line in history))
                self._drop_completions_after(max((line["step"] for line in history), default=0))

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._unwritten += json.dumps({"step": step, **strict(metrics)}) + "\n"
        self._write()

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        """Write a line per completion. Those that do not fit on the disk are lost: they could fill the RAM."""
        with self._at_most_a_warning():
            append_whole(self.texts, "".join(json.dumps({"step": step, **strict(row)}) + "\n" for row in rows))

    def finish(self, summary: dict[str, Any]) -> str:
        if self._unwritten:
            self._write()
        return ""

    def _write(self) -> None:
        with self._at_most_a_warning():
            append_whole(self.path, self._unwritten)
            self._unwritten = ""

    def _drop_completions_after(self, step: int) -> None:
        """Drop completions of steps that a resumed run repeats, and a line that a killed run left unfinished."""
        if not self.texts.exists():
            return
        with self.texts.open("rb") as lines, replaced(self.texts) as file:
            file.writelines(line for line in lines if line.endswith(b"}\n") and 0 <= completion_step(line) <= step)

    @contextmanager
    def _at_most_a_warning(self) -> Iterator[None]:
        """Warn about a full disk instead of ending the run: the next checkpoint also has every line."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                print(f"Warning: {self.path} could not be written ({error.strerror}).", file=sys.stderr)
            self._warned = True


class Watched:
    """Wrapper of another library's tracker: its errors become one warning."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name, self._warned, self._tracker = name, False, None
        with self._at_most_a_warning():
            self._tracker = make()

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        with self._at_most_a_warning():
            if self._tracker:
                self._tracker.log(metrics, step=step)

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        with self._at_most_a_warning():
            if self._tracker:
                self._tracker.completions(rows, step=step)

    def finish(self, summary: dict[str, Any]) -> str:
        with self._at_most_a_warning():
            return self._tracker.finish(summary) if self._tracker else ""
        return ""

    @contextmanager
    def _at_most_a_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of networks, disks and servers have no common type
            if not self._warned:
                reason = escape_control_chars((str(error).strip() or type(error).__name__).splitlines()[0][:160])
                warning = f"Warning: {self.name} failed ({reason}). Training continues; {METRICS_FILE} has every step."
                print(warning, file=sys.stderr, flush=True)
            self._warned = True


def check_trackers(names: Sequence[str]) -> None:
    """Check, before a model is loaded, that trackers are installed and wandb has a key or stays offline.

    Raises UsageError.
    """
    missing = [name for name in names if name != "none" and find_spec(name) is None]
    if missing:
        lines = [f"{name} is not installed: pip install {name}" for name in missing]
        raise one_error(UsageError, f"--report_to {','.join(names)} cannot work:", lines)
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not _has_wandb_key():
        raise UsageError(
            "--report_to wandb needs a key: set WANDB_API_KEY or run `wandb login`.\n"
            "Without network, WANDB_MODE=offline keeps the run in the output folder; `wandb sync` sends it later."
        )


def make_trackers(config: TrainConfig, folder: Path, progress: Progress) -> list[Tracker]:
    """Make the trackers of a run, only on rank 0."""
    settings = {**asdict(config), "environment": read_json(folder, ENVIRONMENT_FILE)}
    lines: list[Tracker] = [JsonLines(folder, progress.log_history)]
    return lines + [
        Watched(name, lambda name=name: _make(name, folder, settings, progress))  # type: ignore[misc]
        for name in config.trackers
        if name != "none"
    ]


def _make(name: str, folder: Path, settings: dict[str, Any], progress: Progress) -> Tracker:
    """Make a tracker. Its library is imported here, so only if the tracker is used."""
    if name == "wandb":
        from grpo_ds.report.wandb_tracker import Wandb as Kind
    elif name == "tensorboard":
        from grpo_ds.report.tensorboard_tracker import TensorBoard as Kind  # type: ignore[assignment]
    elif name == "trackio":
        from grpo_ds.report.trackio_tracker import Trackio as Kind  # type: ignore[assignment]
    else:
        raise ValueError(f"There is no tracker {name!r}.")
    return Kind(folder, settings, progress)


def _has_wandb_key() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc")).expanduser()
    return "WANDB_API_KEY" in os.environ or host in _text(netrc)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
