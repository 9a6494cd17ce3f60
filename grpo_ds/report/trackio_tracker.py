"""Trackio: a data base on this machine (TRACKIO_DIR), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

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

from grpo_ds.report.reading import ANSWERS, held_out_answers, memory_by_phase, numbers
from grpo_ds.run_folder.progress import Progress

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio:
    """A run there; it goes on by name, so a new run's name is one that no other has."""

    name = "trackio"

    def __init__(self, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
        self._folder, known = folder, progress.trackers.get("trackio")
        self._project = os.environ.get("TRACKIO_PROJECT", "grpo_ds")
        name, resume = known or f"{folder.name}-{secrets.token_hex(2)}", "allow" if known else "never"
        # The metrics have the run's memory; what else the machine does is not the run's to keep.
        watch = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        with _quiet():
            self._run = trackio.init(self._project, name=name, resume=resume, config=settings, **watch)
        progress.trackers["trackio"] = name
        atexit.register(_finish)  # where the run ends before its time; before trackio's own, which speaks

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def completions(self, rows: Sequence[dict[str, Any]], *, step: int) -> None:
        data = [list(row.values()) for row in rows]
        self._run.log({"completions": trackio.Table(columns=list(rows[0]), data=data)}, step=step)

    def finish(self, summary: dict[str, Any]) -> str:
        found = numbers({"summary": summary, "memory_gib": memory_by_phase(self._folder)})
        answers = trackio.Table(columns=list(ANSWERS), data=[list(row) for row in held_out_answers(self._folder)])
        self._run.log({**found, "held_out": answers}, step=summary["steps"])
        _finish()
        if server := os.environ.get("TRACKIO_SERVER_URL"):
            return urlsplit(server)._replace(query="", fragment="").geturl()  # which may hold a key
        space = os.environ.get("TRACKIO_SPACE_ID")
        return (
            f"https://huggingface.co/spaces/{space}"
            if space
            else f"trackio show --project {shlex.quote(self._project)}"
        )


def _finish() -> None:
    """What is still on its way is written; once."""
    if trackio.context_vars.current_run.get() is not None:
        with _quiet():
            trackio.finish()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its lines, which speak of uploads where there are none; a run kept here asks the hub for no name."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not any(map(os.environ.get, ELSEWHERE))  # else it sends the token of `hf auth`
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
