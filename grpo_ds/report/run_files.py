"""A run's folder as a report reads it: whatever is there, of a run that is done, stopped or going on; no torch.

Texts come from models, data and people: control characters are spelled out here, once, for all that show them. What
cannot be read is left out, and `damaged` names it.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.errors import UsageError
from grpo_ds.report.reading import COMPLETIONS_FILE, ENVIRONMENT_FILE, HELD_OUT_FILE, MEMORY_FILE, METRICS_FILE, STEP
from grpo_ds.run_folder.status import STATUS_FILE
from grpo_ds.settings.config import CONFIG_FILE
from grpo_ds.terminal import escape_control_chars

SIGNS_OF_A_RUN = (METRICS_FILE, STATUS_FILE, HELD_OUT_FILE)
SHOWN_STEPS = 3  # of completions: the first, the middle and the last
LONGEST_TEXT = 4000  # characters of one text; a completion of 300 tokens has about 1500
LONGEST_NAME = 200  # of a label, a phase, a reward, a state

JsonObject = dict[str, Any]


class Damaged(Exception):
    """A file that parses but does not hold what it should."""


@dataclass(slots=True)
class RunFiles:
    """What a run's folder holds; a file that is missing or damaged leaves its field empty."""

    name: str
    steps: list[JsonObject] = field(default_factory=list)  # metrics, a row a step
    evaluations: list[JsonObject] = field(default_factory=list)  # of the held-out questions on the way
    completions: dict[int, list[JsonObject]] = field(default_factory=dict)  # of a few steps
    status: JsonObject = field(default_factory=dict)
    held_out: JsonObject = field(default_factory=dict)
    environment: JsonObject = field(default_factory=dict)
    memory: JsonObject = field(default_factory=dict)
    config: JsonObject = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFiles:
    """Raises UsageError where `folder` holds no run."""
    if not any((folder / name).is_file() for name in SIGNS_OF_A_RUN):
        raise UsageError(
            f"{folder} is no run's folder: {', '.join(SIGNS_OF_A_RUN[:-1])} and {SIGNS_OF_A_RUN[-1]} are not there.\n"
            "Name the --output_dir of a training run: its folder, not a checkpoint in it."
        )
    run = RunFiles(escape_control_chars(folder.resolve().name) or "run")
    run.status = _mapping(run, folder / STATUS_FILE, json.loads)
    run.held_out = _mapping(run, folder / HELD_OUT_FILE, json.loads)
    run.environment = _mapping(run, folder / ENVIRONMENT_FILE, json.loads)
    run.memory = _mapping(run, folder / MEMORY_FILE, json.loads)
    run.config = _mapping(run, folder / CONFIG_FILE, yaml.safe_load)
    _read_metrics(run, folder / METRICS_FILE)
    _read_completions(run, folder / COMPLETIONS_FILE)
    return run


def number(value: Any) -> float | None:
    """A finite number, or None for anything else: null stands for what was not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of 400 digits
        return None


def text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """A text of bearable length; what is no text is written as JSON writes it."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(written) <= longest:
        return written
    return f"{written[:longest]} … ({len(written) - longest} more characters)"


def name(value: Any) -> str:
    """A text of a few words."""
    return text(value, LONGEST_NAME)


def mapping(value: Any) -> JsonObject:
    if not isinstance(value, dict):
        raise Damaged
    return value


def rows(value: Any) -> list[JsonObject]:
    if not isinstance(value, list):
        raise Damaged
    return [mapping(row) for row in value]


def _mapping(run: RunFiles, file: Path, parse: Callable[[str], Any]) -> JsonObject:
    if not file.is_file():
        return {}
    try:
        return mapping(_escaped(parse(file.read_text(encoding="utf-8", errors="replace"))))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, Damaged):
        run.damaged.append(file.name)
        return {}


def _escaped(value: Any) -> Any:
    """Every text in it without what a terminal or a page would obey."""
    if isinstance(value, str):
        return escape_control_chars(value)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return (
        {escape_control_chars(str(key)): _escaped(item) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def _read_metrics(run: RunFiles, file: Path) -> None:
    """Steps and evaluations in the order of their steps."""
    lines = _lines(file)
    parsed = [_row(line) for line in lines]
    if parsed and parsed[-1] is None:
        parsed.pop()  # a run that goes on is writing it
    found = [row for row in parsed if row is not None]
    if len(found) < len(parsed):
        run.damaged.append(f"{file.name} ({len(parsed) - len(found)} of its lines)")
    for row in sorted(found, key=lambda row: row["step"]):
        is_evaluation = any(name.startswith("eval/") for name in row)
        (run.evaluations if is_evaluation else run.steps).append(row)


def _lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().splitlines() if file.is_file() else []
    except OSError:
        return []


def _row(line: bytes) -> JsonObject | None:
    """A line that belongs to a step, else None."""
    try:
        row = _escaped(json.loads(line.decode(errors="replace")))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and number(row.get("step")) is not None else None


def _read_completions(run: RunFiles, file: Path) -> None:
    """Those of the first, the middle and the last step alone: the file of a long run holds gigabytes."""
    try:
        where = _offsets(file) if file.is_file() else {}
        for step in _spread(sorted(where)):
            run.completions[step] = list(_rows_at(file, where[step]))
    except OSError:
        run.damaged.append(file.name)
    run.completions = {step: found for step, found in run.completions.items() if found}


def _offsets(file: Path) -> dict[int, list[int]]:
    """Where in the file the lines of each step begin."""
    where: dict[int, list[int]] = {}
    with file.open("rb") as lines:
        at = 0
        for line in lines:
            if begins := STEP.match(line):
                where.setdefault(int(begins[1]), []).append(at)
            at += len(line)
    return where


def _rows_at(file: Path, offsets: list[int]) -> Iterator[JsonObject]:
    with file.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            if row := _row(lines.readline()):
                yield row


def _spread(steps: list[int]) -> list[int]:
    """First, middle and last."""
    at = {round(i * (len(steps) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)} if steps else set()
    return [steps[i] for i in sorted(at)]
