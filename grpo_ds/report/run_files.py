"""Read a run's folder. No torch.

`read_run` is for the report page: it takes a run that is done, stopped or still running, leaves out what it cannot read
and lists that in `damaged`. Texts come from models, data and users; it escapes their control characters once, for
all readers. The functions below it are for trackers and the model card, at the end of a run, when no file is damaged.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.errors import UsageError
from grpo_ds.memory.plan import GIB, MEMORY_NAMES
from grpo_ds.run_folder.files import (
    COMPLETIONS_FILE,
    ENVIRONMENT_FILE,
    HELD_OUT_FILE,
    MEMORY_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
)
from grpo_ds.run_folder.progress import current_names
from grpo_ds.run_folder.status import STATUS_FILE
from grpo_ds.settings.saved_config import CONFIG_FILE
from grpo_ds.terminal import escape_control_chars

SIGNS_OF_A_RUN = (METRICS_FILE, STATUS_FILE, HELD_OUT_FILE)
COMPLETION_LINE = re.compile(rb'\{"step": (\d{1,12}),')  # beginning of a line of completions.jsonl
SHOWN_STEPS = 3  # steps whose completions are read: the first, the middle and the last
LONGEST_TEXT = 4000  # characters of one text; a completion of 300 tokens has about 1500
LONGEST_LABEL = 200  # characters of an answer, a phase, a reward's name, a state
OLD_MEMORY_KEYS = {"host": "ram", "host_peak": "ram_peak", "host_end": "ram_end"}
ANSWER_COLUMNS = (
    *("id", "question", "label", "before", "after", "reward before", "reward after", "text before", "text after"),
)

JsonObject = dict[str, Any]


class Damaged(Exception):
    """A file that parses but does not have the expected content."""


@dataclass(slots=True)
class RunFiles:
    """Content of a run's folder; the field of a missing or damaged file is empty.

    Example: a run that was stopped in its second step.
        >>> run = RunFiles("my run", steps=[{"step": 1, "reward": 0.5}], status={"state": "stopped"})
        >>> run.steps[-1]["step"], run.held_out, run.damaged
        (1, {}, [])
    """

    name: str
    steps: list[JsonObject] = field(default_factory=list)  # metrics, a line per step
    evaluations: list[JsonObject] = field(default_factory=list)  # of the held-out questions, during training
    completions: dict[int, list[JsonObject]] = field(default_factory=dict)  # of some steps
    status: JsonObject = field(default_factory=dict)
    held_out: JsonObject = field(default_factory=dict)
    environment: JsonObject = field(default_factory=dict)
    memory: JsonObject = field(default_factory=dict)
    config: JsonObject = field(default_factory=dict)
    summary: JsonObject = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder for the report. Raises UsageError if `folder` holds no run."""
    if not any((folder / name).is_file() for name in SIGNS_OF_A_RUN):
        raise UsageError(
            f"{folder} is not a run's folder: it has no {', '.join(SIGNS_OF_A_RUN[:-1])} or {SIGNS_OF_A_RUN[-1]}.\n"
            "Name the --output_dir of a training run: its folder, not a checkpoint in it."
        )
    run = RunFiles(escape_control_chars(folder.resolve().name) or "run")
    run.status = _read_object(run, folder / STATUS_FILE, json.loads)
    run.held_out = _read_object(run, folder / HELD_OUT_FILE, json.loads)
    run.environment = _read_object(run, folder / ENVIRONMENT_FILE, json.loads)
    run.memory = _read_object(run, folder / MEMORY_FILE, lambda content: current_memory(json.loads(content)))
    run.config = _read_object(run, folder / CONFIG_FILE, yaml.safe_load)
    run.summary = _read_object(run, folder / SUMMARY_FILE, json.loads)
    _read_metrics(run, folder / METRICS_FILE)
    _read_completions(run, folder / COMPLETIONS_FILE)
    return run


def read_json(folder: Path, name: str) -> JsonObject:
    """Read a JSON object of the folder; {} without the file. Raises ValueError if it is damaged."""
    file = folder / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def read_settings(folder: Path) -> JsonObject:
    """Read grpo_config.yaml, every setting of the run; {} without the file."""
    file = folder / CONFIG_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def held_out_answers(folder: Path) -> list[tuple[Any, ...]]:
    """Return each held-out question with its answers before and after training, in the columns of ANSWER_COLUMNS."""
    return [_answers(question) for question in read_json(folder, HELD_OUT_FILE).get("questions", [])]


def memory_by_phase(folder: Path) -> dict[str, dict[str, float | None]]:
    """Return phase -> "ram", "ram planned", "gpu", "gpu planned" -> GiB at the peak; None: not planned."""
    memory = current_memory(read_json(folder, MEMORY_FILE))
    planned = memory.get("planned", {})
    return {use["phase"]: _phase_gib(use, planned.get(use["phase"])) for use in memory.get("measured", [])}


def flat_numbers(nested: JsonObject) -> dict[str, float]:
    """Return every number of nested objects under the path to it, such as summary/after/accuracy."""
    numbers: dict[str, float] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in flat_numbers(value).items()}
        elif isinstance(value, int | float):
            numbers[name] = float(value)
    return numbers


def current_memory(content: Any) -> Any:
    """Return the content of memory.json, of this version or an older one, under the keys of this version."""
    if isinstance(content, list):
        return [current_memory(item) for item in content]
    if isinstance(content, dict):
        return {OLD_MEMORY_KEYS.get(key, key): current_memory(item) for key, item in content.items()}
    return content


def completion_step(line: bytes) -> int:
    """Return the step of a line of completions.jsonl, -1 for any other line."""
    begins = COMPLETION_LINE.match(line)
    return int(begins[1]) if begins else -1


def as_number(value: Any) -> float | None:
    """Return a finite number, None for anything else; null in a file stands for a number that was not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of 400 digits
        return None


def as_text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """Return a text of limited length; any other value is written as JSON."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(written) <= longest:
        return written
    return f"{written[:longest]} … ({len(written) - longest} more characters)"


def as_label(value: Any) -> str:
    """Return a text of a few words."""
    return as_text(value, LONGEST_LABEL)


def as_object(value: Any) -> JsonObject:
    """Return the value, which must be a JSON object. Raises Damaged."""
    if not isinstance(value, dict):
        raise Damaged
    return value


def as_objects(value: Any) -> list[JsonObject]:
    """Return the value, which must be a list of JSON objects. Raises Damaged."""
    if not isinstance(value, list):
        raise Damaged
    return [as_object(item) for item in value]


def _answers(question: JsonObject) -> tuple[Any, ...]:
    both = [question.get(when, {}) for when in ("before", "after")]
    by_kind = [answers.get(kind) for kind in ("answer", "reward", "text") for answers in both]
    return (question["id"], question["question"], question["label"], *by_kind)


def _phase_gib(use: JsonObject, planned: dict[str, dict[str, int]] | None) -> dict[str, float | None]:
    gib: dict[str, float | None] = {}
    for kind in reversed(MEMORY_NAMES):
        gib[kind] = use[f"{kind}_peak"] / GIB
        gib[f"{kind} planned"] = sum(planned[kind].values()) / GIB if planned else None
    return gib


def _read_object(run: RunFiles, file: Path, parse: Callable[[str], Any]) -> JsonObject:
    if not file.is_file():
        return {}
    try:
        return as_object(_escaped(parse(file.read_text(encoding="utf-8", errors="replace"))))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, Damaged):
        run.damaged.append(file.name)
        return {}


def _escaped(value: Any) -> Any:
    """Escape the control characters of every text in it, which would control a terminal or a page."""
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
    """Read steps and evaluations, in the order of their steps."""
    parsed = [_parse_metrics(line) for line in _lines(file)]
    if parsed and parsed[-1] is None:
        parsed.pop()  # a running run is writing it
    rows = [row for row in parsed if row is not None]
    if len(rows) < len(parsed):
        run.damaged.append(f"{file.name} ({len(parsed) - len(rows)} of its lines)")
    for row in sorted(rows, key=lambda row: row["step"]):
        is_evaluation = any(name.startswith("eval/") for name in row)
        (run.evaluations if is_evaluation else run.steps).append(row)


def _lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().splitlines() if file.is_file() else []
    except OSError:
        return []


def _parse_line(line: bytes) -> JsonObject | None:
    """Return a line that belongs to a step, else None."""
    try:
        row = _escaped(json.loads(line.decode(errors="replace")))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and as_number(row.get("step")) is not None else None


def _parse_metrics(line: bytes) -> JsonObject | None:
    row = _parse_line(line)
    try:
        return current_names(row) if row else None
    except TypeError:  # a text instead of a number
        return None


def _read_completions(run: RunFiles, file: Path) -> None:
    """Read the completions of only the first, middle and last step: a long run's file has gigabytes."""
    try:
        offsets = _offsets(file) if file.is_file() else {}
        for step in _spread(sorted(offsets)):
            run.completions[step] = list(_rows_at(file, offsets[step]))
    except OSError:
        run.damaged.append(file.name)
    run.completions = {step: rows for step, rows in run.completions.items() if rows}


def _offsets(file: Path) -> dict[int, list[int]]:
    """Return step -> positions in the file at which its lines begin."""
    offsets: dict[int, list[int]] = {}
    with file.open("rb") as lines:
        position = 0
        for line in lines:
            if (step := completion_step(line)) >= 0:
                offsets.setdefault(step, []).append(position)
            position += len(line)
    return offsets


def _rows_at(file: Path, offsets: list[int]) -> Iterator[JsonObject]:
    with file.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            if row := _parse_line(lines.readline()):
                yield row


def _spread(steps: list[int]) -> list[int]:
    """Return the first, the middle and the last."""
    indices = {round(i * (len(steps) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)} if steps else set()
    return [steps[i] for i in sorted(indices)]
