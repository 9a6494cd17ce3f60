"""Records: the three spellings of their fields, and all checks of a single record. No files here.

`check_record` returns the fields and all their problems; the caller adds the file and the place.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite, isnan

from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.numbers import number_of, number_text
from grpo_ds.task.spelling import label_key

NO_CONTEXT = "none"  # as the name of the context field: the questions have no context
LONGEST_QUOTE = 40  # characters of a bad value that an error repeats
LONGEST_ID = 200  # characters: errors and reports name a record by its id, on one line
# Signs of damaged files: control characters that are not layout (text read in the wrong code page, an end-of-file
# mark), half a surrogate pair, which JSON can spell but no tokenizer accepts, U+FFFD instead of unreadable bytes.
BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd-\uffff]")
INVISIBLE = "\ufeff\u200b"  # byte order mark and zero-width space: around a text they count as white space


@dataclass(frozen=True, slots=True)
class FieldNames:
    """Names of a record's fields in one of the known spellings."""

    question: str
    context: str
    label: str
    id: str


OURS = FieldNames("question", "context", "ground_truth", "id")
ORIGINAL = FieldNames("QUESTION", "CONTEXTS", "final_decision", "id")  # ori_pqal.json; its PMIDs become ids before this
HUB = FieldNames("question", "context", "final_decision", "pubid")  # qiaojin/PubMedQA
REQUIRED_NAMES = {name for names in (OURS, ORIGINAL, HUB) for name in (names.question, names.context, names.label)}


class Unusable(Exception):
    """A field that cannot be used; the message starts with a verb ("is missing")."""


def check_record(
    record: object,
    *,
    known_labels: Collection[str],
    names: Mapping[str, str] | None = None,
    label_needed: bool = True,
    answers: AnswerKind = "labels",
) -> tuple[dict[str, str], list[str]]:
    """Return (fields, problems): text, context, label and the id if there is one; each problem names its field.

    names: the names of the fields "question", "context" and "label", if they were given.
    """
    if not isinstance(record, dict):
        return {}, [f"is {describe(record)}, not an object with fields"]
    spelling = _spelling_of(record, names or {})
    checks: list[tuple[str, str, Callable[[object], str]]] = [
        ("text", spelling.question, sound_text),
        ("context", spelling.context, _context),
        ("label", spelling.label, lambda value: _label(value, known_labels, answers)),
        ("id", spelling.id, _id),
    ]
    fields: dict[str, str] = {"context": ""} if spelling.context == NO_CONTEXT else {}
    if answers == "none":
        fields["label"] = ""
        fields |= {} if spelling.context in record else {"context": ""}
    problems, optional = [], {"id"} if label_needed else {"id", "label"}
    for field, name, check in checks:
        if field in fields or (name not in record and field in optional):
            continue
        try:
            fields[field] = check(_present(record, name))
        except Unusable as problem:
            problems.append(f"{name} {problem}")
    if answers == "labels" and "label" in fields and "label" not in (names or {}):
        problems += _contradictions(record, spelling.label, fields["label"], known_labels)
    return fields, problems


def describe(value: object) -> str:
    """Name a JSON value for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN (a missing value)" if isnan(value) else "infinity"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def quote(value: str) -> str:
    """Quote a value, on one line and shortened to LONGEST_QUOTE characters."""
    return repr(value if len(value) <= LONGEST_QUOTE else value[: LONGEST_QUOTE - 3] + "...")


def _spelling_of(record: dict, names: Mapping[str, str]) -> FieldNames:
    # The spelling with the most fields in the record, so that a missing field is named in the file's spelling.
    spellings = [replace(spelling, **names) for spelling in (OURS, HUB, ORIGINAL)]
    return max(spellings, key=lambda known: sum(n in record for n in (known.question, known.context, known.label)))


def sound_text(value: object) -> str:
    """Return the text without surrounding white space. Raises Unusable if it is empty, invisible or broken."""
    if not isinstance(value, str):
        raise Unusable(f"is {describe(value)}, not a text")
    if broken := BROKEN.search(value):
        raise Unusable(f"holds a broken character, U+{ord(broken[0]):04X}, at position {broken.start()}")
    if not any(character.isprintable() and character != " " for character in value):
        raise Unusable("is empty")
    return value.strip().strip(INVISIBLE).strip()


def _present(record: dict, name: str) -> object:
    if name not in record:
        raise Unusable("is missing")
    return record[name]


def _contradictions(record: dict, name: str, label: str, known_labels: Collection[str]) -> Iterator[str]:
    """Yield a problem if the label field of another spelling is there too and holds another answer."""
    for other_name in {OURS.label, HUB.label} & set(record) - {name}:
        with suppress(Unusable):
            if (other := _label(record[other_name], known_labels)) != label:
                yield f"{name} says {quote(label)} and {other_name} {quote(other)}; choose with --label_field"


def _context(value: object) -> str:
    """Accept a text, or PubMedQA's list of paragraphs (on the hub: in an object); return one paragraph per line."""
    if isinstance(value, dict) and "contexts" in value:
        value = value["contexts"]
    if not isinstance(value, list):
        return sound_text(value)
    wrong = [describe(part) for part in value if not isinstance(part, str)]
    if wrong:
        raise Unusable(f"is a list that holds {wrong[0]}; every part must be a text")
    return sound_text("\n".join(part.strip() for part in value))


def _label(value: object, known_labels: Collection[str], answers: AnswerKind = "labels") -> str:
    if answers == "number":
        written = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else sound_text(value)
        if (number := number_of(written)) is None:
            raise Unusable(f"is {quote(written)}, which is not a number")
        return number_text(number)
    label = _text_or_integer(value)
    if answers == "text":
        return label
    spelled = {label_key(known): known for known in known_labels}.get(label_key(label))
    if spelled is None:
        raise Unusable(f"is {quote(label)}; it must be {' or '.join(known_labels)}")
    return spelled


def _text_or_integer(value: object) -> str:
    """Accept integers too: PMIDs are numbers on the hub, and so are the answers of many data sets."""
    if isinstance(value, float) and isfinite(value):
        raise Unusable(f"is {value}, but a number here must be an integer (1, not 1.0)")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else sound_text(value)


def _id(value: object) -> str:
    record_id = _text_or_integer(value)
    if len(record_id) > LONGEST_ID or len(record_id.splitlines()) > 1:
        raise Unusable(f"is {quote(record_id)}; it must be one line of at most {LONGEST_ID} characters")
    return record_id
