"""Trackio: a database on this machine (TRACKIO_DIR), or on the server of TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

import atexit
import io
import os
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trackio
from huggingface_hub import constants

from grpo_ds.report.run_files import ANSWER_COLUMNS, flat_numbers, held_out_answers, memory_by_phase
from grpo_ds.run_folder.progress import Progress

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio:
    """Log to a Trackio run. A run is resumed by its name, so each new run gets a unique name."""

    name = "trackio"

    def __init__(self, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
        self._folder, known = folder, progress.trackers.get("trackio")
        self._project = os.environ.get("TRACKIO_PROJECT", "grpo_ds")
        name, resume = known or f"{folder.name}-{secrets.token_hex(2)}", "allow" if known else "never"
        # The metrics have the run's own memory; other programs of the machine are not logged.
        watch = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        with _quiet():
            self._run = trackio.init(self._project, name=name, resume=resume, config=settings, **watch)
        progress.trackers["trackio"] = name
        atexit.register(_finish)  # for a run that ends early; runs before trackio's own handler, which prints

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        data = [list(row.values()) for row in rows]
        self._run.log({"completions": trackio.Table(columns=list(rows[0]), data=data)}, step=step)

    def finish(self, summary: dict[str, Any]) -> str:
        numbers = flat_numbers({"summary": summary, "memory_gib": memory_by_phase(self._folder)})
        rows = [list(row) for row in held_out_answers(self._folder)]
        answers = trackio.Table(columns=list(ANSWER_COLUMNS), data=rows)
        self._run.log({**numbers, "held_out": answers}, step=summary["steps"])
        _finish()
        if server := os.environ.get("TRACKIO_SERVER_URL"):
            return urlsplit(server)._replace(query="", fragment="").geturl()  # the query may contain a key
        space = os.environ.get("TRACKIO_SPACE_ID")
        return (
            f"https://huggingface.co/spaces/{space}"
            if space
            else f"trackio show --project {shlex.quote(self._project)}"
        )


def _finish() -> None:
    """Write the metrics that are not written yet. Further calls do nothing."""
    if trackio.context_vars.current_run.get() is not None:
        with _quiet():
            trackio.finish()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide trackio's output, which mentions uploads that do not happen, and keep a local run off the network."""
    before = constants.HF_HUB_OFFLINE
    # While the hub library is online, trackio sends it the token of `hf auth`.
    constants.HF_HUB_OFFLINE = before or not any(map(os.environ.get, REMOTE))
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
