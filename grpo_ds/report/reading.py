"""What a run has written, read back from its folder, for trackers and the model card; no torch. What is missing is
empty."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.memory.plan import GIB
from grpo_ds.settings.config import CONFIG_FILE

METRICS_FILE, COMPLETIONS_FILE = "metrics.jsonl", "completions.jsonl"
HELD_OUT_FILE, ENVIRONMENT_FILE = "held_out.json", "environment.json"
STEP = re.compile(rb'\{"step": (\d{1,12}),')  # how the lines of completions.jsonl begin
MEMORY_FILE, SUMMARY_FILE = "memory.json", "summary.json"
ANSWERS = ("id", "question", "label", "before", "after", "reward before", "reward after", "text before", "text after")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; {} where there is none. Raises ValueError where it is damaged."""
    file = folder / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """grpo_config.yaml: every setting of the run."""
    file = folder / CONFIG_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def held_out_answers(folder: Path) -> list[tuple[Any, ...]]:
    """Every held-out question with its answers before and after training, in the columns of ANSWERS."""
    return [_answers(question) for question in read_json(folder, HELD_OUT_FILE).get("questions", [])]


def memory_by_phase(folder: Path) -> dict[str, dict[str, float | None]]:
    """GiB at the peak of each phase on host and card, and what was planned (None: nothing)."""
    memory = read_json(folder, MEMORY_FILE)
    planned = memory.get("planned", {})
    return {use["phase"]: _gib(use, planned.get(use["phase"])) for use in memory.get("measured", [])}


def numbers(nested: dict[str, Any]) -> dict[str, float]:
    """Every number in it under the path to it: summary/after/accuracy."""
    found: dict[str, float] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float):
            found[name] = float(value)
    return found


def _answers(question: dict[str, Any]) -> tuple[Any, ...]:
    both = [question.get(when, {}) for when in ("before", "after")]
    by_kind = [answers.get(kind) for kind in ("answer", "reward", "text") for answers in both]
    return (question["id"], question["question"], question["label"], *by_kind)


def _gib(use: dict[str, Any], planned: dict[str, dict[str, int]] | None) -> dict[str, float | None]:
    gib: dict[str, float | None] = {}
    for where in ("host", "gpu"):
        gib[where] = use[f"{where}_peak"] / GIB
        gib[f"{where} planned"] = sum(planned[where].values()) / GIB if planned else None
    return gib
