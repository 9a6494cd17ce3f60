"""Where metrics go: metrics.jsonl always, wandb when asked."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from grpo_ds.checkpoint import write_whole
from grpo_ds.config import TrainConfig
from grpo_ds.errors import UsageError
from grpo_ds.progress import Progress, strict

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
SUMMARY_FILE = "summary.json"


class Tracker(Protocol):
    """Hears of every step, with --log_completions of what was written in it, and of the end."""

    def log(self, metrics: dict[str, float], *, step: int) -> None: ...
    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


class JsonLines:
    """One JSON object a step, on disk before the next step begins; of a resumed run the steps before first."""

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]] = ()) -> None:
        self.path, self.texts, self._told = folder / METRICS_FILE, folder / COMPLETIONS_FILE, False
        if self.path.exists() or history:
            with self._going_on():
                write_whole(self.path, "".join(json.dumps(line) + "\n" for line in history))
                self._forget_after(max((line["step"] for line in history), default=0))

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        with self._going_on(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **strict(metrics)}) + "\n")

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        with self._going_on(), self.texts.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **strict(row)}) + "\n" for row in rows)

    def finish(self, summary: dict[str, Any]) -> None:
        with self._going_on():
            text = json.dumps(strict(summary), indent=1) + "\n"
            (self.path.parent / SUMMARY_FILE).write_text(text, encoding="utf-8")

    def _forget_after(self, step: int) -> None:
        """Of the completions of steps that a resumed run makes again."""
        if self.texts.exists():
            kept = [line for line in self.texts.open(encoding="utf-8") if json.loads(line)["step"] <= step]
            write_whole(self.texts, "".join(kept))

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A full disk ends no run: every line is in the next checkpoint too."""
        try:
            yield
        except OSError as error:
            if not self._told:
                print(f"Warning: {self.path} could not be written ({error.strerror}).", file=sys.stderr)
            self._told = True


class Wandb:
    """Weights & Biases; WANDB_API_KEY, WANDB_PROJECT and WANDB_MODE are honoured, no key is taken by flag."""

    def __init__(self, folder: Path, config: dict[str, Any], progress: Progress) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "grpo_ds")
        known = progress.trackers.get("wandb")  # of the run this one goes on with
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=config,
            id=known,
            resume="allow" if known else None,
        )
        progress.trackers["wandb"] = self._run.id

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log(metrics, step=step)

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        import wandb

        columns: list[Any] = ["step", *rows[0]]
        data: list[Any] = [[step, *row.values()] for row in rows]
        self._run.log({"completions": wandb.Table(columns=columns, data=data)}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()


def check_trackers(report_to: str) -> None:
    """Before a model is loaded: wandb must be able to log, or be told to stay offline."""
    if "wandb" not in report_to.split(","):
        return
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _text(Path.home() / ".netrc")
    if not has_key and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise UsageError(
            "--report_to wandb needs a key: set WANDB_API_KEY or run `wandb login`.\n"
            "Without network, WANDB_MODE=offline keeps the run in the output folder; `wandb sync` sends it later."
        )


def make_trackers(config: TrainConfig, folder: Path, progress: Progress) -> list[Tracker]:
    """The trackers of a run; rank 0 alone makes them."""
    wanted = config.report_to.split(",")
    lines: list[Tracker] = [JsonLines(folder, progress.log_history)]
    return lines + ([Wandb(folder, asdict(config), progress)] if "wandb" in wanted else [])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
