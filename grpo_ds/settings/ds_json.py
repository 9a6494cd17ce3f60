"""Read a DeepSpeed JSON strictly: every mistake is an error with its place and a remedy.

Standard library only, like ds_config.py.
"""

import json
from pathlib import Path
from typing import Any

from grpo_ds.errors import UsageError
from grpo_ds.settings.shipped import DS_JSONS

AUTO = "auto"  # a value that the flags fill


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file. Raises UsageError, with line and column for broken JSON."""
    path = DS_JSONS.find(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        config = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        lines = text.split("\n")
        line = lines[min(error.lineno, len(lines)) - 1].strip()[:80] or "(nothing there)"
        place = f"{path}, line {error.lineno}, column {error.colno}: {error.msg}"
        raise UsageError(f"{place}\n  {line}\n  {json_hint(error)}") from None
    except (ValueError, RecursionError) as error:  # our two hooks, bytes that are not UTF-8, too deep nesting
        raise UsageError(f"{path} is not a DeepSpeed JSON: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise UsageError(
            f"{path} holds {kind(config)}, but a DeepSpeed JSON is an object: " + '{"zero_optimization": ...}'
        )
    return config


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object without its nulls: DeepSpeed mostly ignores null, and sometimes crashes on it."""
    seen = [key for key, _ in pairs]
    twice = sorted({key for key in seen if seen.count(key) > 1})
    if twice:
        raise ValueError(f'"{twice[0]}" is given twice in one object; keep one of them')
    return {key: value for key, value in pairs if value is not None}


def no_constant(name: str) -> float:
    """Refuse NaN and Infinity, which Python's reader accepts."""
    raise ValueError(f"{name} is not a number in JSON; write a finite number")


def json_hint(error: json.JSONDecodeError) -> str:
    """Return the most likely reason for broken JSON at this place."""
    before, here = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if here.startswith(("//", "/*", "#")):
        return f"JSON has no comments; {DS_JSONS.folder}/README.md explains every key."
    if "trailing comma" in error.msg or (before.endswith(",") and here.startswith(("}", "]"))):
        return "Remove the comma before the closing bracket."
    if here.startswith("'"):
        return 'JSON takes double quotes: "auto".'
    if here.startswith(("True", "False", "None")):
        return "JSON writes true, false and null."
    if "',' delimiter" in error.msg and here:
        return "A comma is missing before this."
    return f"Compare with {DS_JSONS.folder}/zero2.json."


def kind(value: Any) -> str:
    """Describe a JSON value: true, the number 3, the text "auto", a list, an object."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {json.dumps(value[:40])}"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"the number {value}"


# --- nested sections by dotted path ------------------------------------------------------------------------


def get_value(config: dict[str, Any], path: str) -> Any:
    """Return the value at "a.b.c"; None if it or its section is missing."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def set_value(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at "a.b.c", whose section exists."""
    section, _, key = path.rpartition(".")
    (get_value(config, section) if section else config)[key] = value


def has_section(config: dict[str, Any], path: str) -> bool:
    """True if the section of "a.b.c" exists: a.b."""
    section = path.rpartition(".")[0]
    return not section or isinstance(get_value(config, section), dict)
