"""TensorBoard: event files in `runs` of the run's folder, as transformers does it, or in TENSORBOARD_LOGGING_DIR."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from grpo_ds.report.markdown import fenced, table
from grpo_ds.report.run_files import ANSWER_COLUMNS, flat_numbers, held_out_answers, memory_by_phase
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.paths import absolute


class TensorBoard:
    """Log scalars of every step, settings and texts. A resumed run hides the old values of repeated steps."""

    name = "tensorboard"

    def __init__(self, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
        self._folder = folder
        self._logs = Path(absolute(os.environ.get("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))))
        resumed = "tensorboard" in progress.trackers
        self._writer = SummaryWriter(str(self._logs), purge_step=progress.global_step + 1 if resumed else None)
        self._writer.add_text("config", fenced(yaml.safe_dump(settings, sort_keys=False), "yaml"), progress.global_step)
        progress.trackers["tensorboard"] = str(self._logs)

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that only the last step of a killed run is lost

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        self._writer.add_text("completions", table(list(rows[0]), [list(row.values()) for row in rows]), step)

    def finish(self, summary: dict[str, Any]) -> str:
        step = summary["steps"]
        for name, value in flat_numbers({"summary": summary, "memory_gib": memory_by_phase(self._folder)}).items():
            self._writer.add_scalar(name, value, step)
        self._writer.add_text("held_out", table(ANSWER_COLUMNS, held_out_answers(self._folder)), step)
        self._writer.close()
        return f"tensorboard --logdir {shlex.quote(str(self._logs))}"
