"""Where metrics go: metrics.jsonl always, wandb when asked."""

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from grpo_ds.errors import UsageError

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Hears of every step, and of the end."""

    def log(self, metrics: dict[str, float], *, step: int) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


class JsonLines:
    """One JSON object a step, on disk before the next step begins."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **_strict(metrics)}) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        (self.path.parent / "summary.json").write_text(json.dumps(_strict(summary), indent=1) + "\n", encoding="utf-8")


class Wandb:
    """Weights & Biases; WANDB_API_KEY, WANDB_PROJECT and WANDB_MODE are honoured, no key is taken by flag."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "grpo_ds")
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), config=config)

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log(metrics, step=step)

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


def make_trackers(report_to: str, folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run; rank 0 alone makes them."""
    asked = report_to.split(",")
    return [JsonLines(folder), *([Wandb(folder, config)] if "wandb" in asked else [])]


def _strict(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: null, as in a step that was skipped for them."""
    return {name: None if isinstance(v, float) and not isfinite(v) else v for name, v in values.items()}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
