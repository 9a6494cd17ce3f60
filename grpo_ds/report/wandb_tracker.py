"""Weights & Biases. Its own environment variables take precedence, and there is no flag for a key."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from grpo_ds.report.run_files import ANSWER_COLUMNS, held_out_answers, memory_by_phase
from grpo_ds.run_folder.progress import Progress

PROJECT = "grpo_ds"


class Wandb:
    """Log to a wandb run; a resumed run keeps its id. Offline, the files are in the run's folder."""

    name = "wandb"

    def __init__(self, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
        self._folder, known = folder, progress.trackers.get("wandb")
        # An argument would override its variable, so arguments whose variable is set are left out.
        ours = {"project": PROJECT, "name": folder.name, "dir": str(folder)}
        ours = {name: value for name, value in ours.items() if f"WANDB_{name.upper()}" not in os.environ}
        resumed = {"id": known, "resume": "allow"} if known else {}
        # A run of its own, beside one that the user's notebook has, or that a failed run left open.
        self._run = wandb.init(config=settings, reinit="create_new", **ours, **resumed)  # type: ignore[arg-type]
        progress.trackers["wandb"] = self._run.id

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log(metrics, step=step)

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        self._table("completions", ["step", *rows[0]], [[step, *row.values()] for row in rows], step=step)

    def finish(self, summary: dict[str, Any]) -> str:
        self._run.summary.update({**summary, "memory_gib": memory_by_phase(self._folder)})
        self._table("held_out", list(ANSWER_COLUMNS), [list(row) for row in held_out_answers(self._folder)])
        files, url = Path(self._run.dir).parent, self._run.url
        offline = self._run.offline
        self._run.finish()
        return f"wandb sync {shlex.quote(str(files))}" if offline else url or ""

    def _table(self, name: str, columns: list[str], data: list[list[Any]], *, step: int | None = None) -> None:
        if data:
            self._run.log({name: wandb.Table(columns=list[str | int](columns), data=data)}, step=step)
