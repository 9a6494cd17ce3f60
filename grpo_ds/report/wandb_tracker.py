"""Weights & Biases: what its own environment variables say stays said, and no key is taken by flag."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from grpo_ds.report.reading import ANSWERS, held_out_answers, memory_by_phase
from grpo_ds.run_folder.progress import Progress

PROJECT = "grpo_ds"


class Wandb:
    """A run there, under the id of the run it goes on with; offline it lies in the run's folder."""

    name = "wandb"

    def __init__(self, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
        self._folder, known = folder, progress.trackers.get("wandb")
        # An argument would win over its variable, so those that were set are left to wandb.
        ours = {"project": PROJECT, "name": folder.name, "dir": str(folder)}
        ours = {name: value for name, value in ours.items() if f"WANDB_{name.upper()}" not in os.environ}
        again = {"id": known, "resume": "allow"} if known else {}
        self._run = wandb.init(config=settings, **ours, **again)  # type: ignore[arg-type]
        progress.trackers["wandb"] = self._run.id

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log(metrics, step=step)

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        self._table("completions", ["step", *rows[0]], [[step, *row.values()] for row in rows], step=step)

    def finish(self, summary: dict[str, Any]) -> str:
        self._run.summary.update({**summary, "memory_gib": memory_by_phase(self._folder)})
        self._table("held_out", list(ANSWERS), [list(row) for row in held_out_answers(self._folder)])
        kept, url = Path(self._run.dir).parent, self._run.url
        offline = self._run.offline
        self._run.finish()
        return f"wandb sync {shlex.quote(str(kept))}" if offline else url or ""

    def _table(self, name: str, columns: list[str], data: list[list[Any]], *, step: int | None = None) -> None:
        if data:
            self._run.log({name: wandb.Table(columns=list[str | int](columns), data=data)}, step=step)
