"""JSON as records: a list, a single record, PubMedQA's mapping of PMIDs to records, or JSON Lines."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from grpo_ds.task.record_shapes import RECORD_NAMES
from grpo_ds.task.records import describe, quote
from grpo_ds.task.spelling import nfc

LONGEST_INTEGER = 4300  # digits that int() reads, Python's default
Placed = tuple[str, object]  # (place, JSON value); a place is "record 3" or "line 3"
LIST, LINES, MAPPING, SINGLE = "a JSON list", "JSON Lines", "a JSON object of records by id", "a single JSON object"


class NoRecords(Exception):
    """JSON that holds no records; the message names its value ("null")."""


def json_records(text: str) -> tuple[str, list[Placed], list[str]] | None:
    """Return (form, records, problems); None if the text is neither JSON nor JSON Lines.

    Raises NoRecords for another JSON value, ValueError or RecursionError for JSON that cannot be read.
    """
    repeated: list[tuple[dict, str]] = []
    try:
        value = _loads(text, repeated)
    except json.JSONDecodeError:
        if not _looks_like_lines(text):
            return None
        return LINES, *_parse_lines(text)
    records = list(_numbered(value))
    form = LIST if not isinstance(value, dict) else MAPPING if _is_mapping(value) else SINGLE
    return form, records, _repetitions(records, repeated)


def where_broken(text: str) -> str:
    """Return line, column and reason of the first place that is not JSON."""
    try:
        json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return ""


def reason(error: Exception) -> str:
    """Say in a few words why a text cannot be read as JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _loads(text: str, repeated: list[tuple[dict, str]]) -> object:
    """Parse JSON with names in NFC, and add to `repeated` those that appear twice in one object.

    JSON keeps only the last value of a name; flags and the parameters of reward functions are compared with names.
    """

    def note_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
        as_dict = {nfc(name): value for name, value in pairs}
        if len(as_dict) < len(pairs):
            counts = Counter(nfc(name) for name, _ in pairs)
            repeated.extend((as_dict, name) for name in as_dict if counts[name] > 1)
        return as_dict

    return json.loads(text, object_pairs_hook=note_repeated, parse_int=_integer)


def _integer(digits: str) -> int | float:
    # An integer that is too long is infinity, as a float that is too large: the record's check names its place.
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _numbered(value: object) -> Iterator[Placed]:
    """Yield (place, record) from a JSON value: a list, PubMedQA's mapping, or a single record."""
    if isinstance(value, dict) and _is_mapping(value):
        for number, (key, record) in enumerate(value.items(), start=1):
            if isinstance(record, dict):
                record.setdefault("id", key)
            yield f"record {number} ({quote(key)})", record
    elif isinstance(value, list | dict):
        for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
            yield f"record {number}", record
    else:
        raise NoRecords(describe(value))


def _is_mapping(value: dict) -> bool:
    # A single record may have names of its own, and then holds no objects; a mapping of PMIDs holds nothing else.
    is_flat = bool(value) and not any(isinstance(part, dict | list) for part in value.values())
    return RECORD_NAMES.isdisjoint(value) and not is_flat


def _looks_like_lines(text: str) -> bool:
    # In JSON Lines at least half of the lines begin an object; in an indented JSON file few do. A list is never lines.
    if text.lstrip().startswith("["):
        return False
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(line.startswith("{") for line in lines) >= len(lines) / 2


def _parse_lines(text: str) -> tuple[list[Placed], list[str]]:
    """Read one JSON value per line; a broken line becomes a problem, and reading continues."""
    records: list[Placed] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold U+2028
        if not line.strip():
            continue
        repeated: list[tuple[dict, str]] = []
        try:
            records.append((f"line {number}", _loads(line, repeated)))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: broken JSON, {reason(error)}")
            continue
        problems.extend(_repetitions(records[-1:], repeated))
    return records, problems


def _repetitions(records: Sequence[Placed], repeated: list[tuple[dict, str]]) -> list[str]:
    """Describe each name that appears twice, with its record; outside all records it is a key of the file's mapping."""
    places = {id(part): place for place, record in records for part in _objects(record)} if repeated else {}
    return [
        f"{places.get(id(part), 'the file')}: {quote(name)} appears twice in one object; keep one"
        for part, name in repeated
    ]


def _objects(value: object) -> Iterator[object]:
    """Yield a JSON value and every value inside it."""
    waiting = [value]
    while waiting:
        yield (part := waiting.pop())
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
