"""What a record is: three spellings of its fields, and every check of one record, with no file in sight.

`check_record` returns the fields or all that is wrong with them; who calls it knows the file and the place.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import isnan

NO_CONTEXT = "none"  # in place of the name of a context's field: the questions stand alone
CLIP = 40  # characters of a bad value that an error repeats


@dataclass(frozen=True, slots=True)
class Form:
    """The names one spelling of a record gives to its fields."""

    question: str
    context: str
    label: str
    id: str


OURS = Form("question", "context", "ground_truth", "id")
ORIGINAL = Form("QUESTION", "CONTEXTS", "final_decision", "id")  # ori_pqal.json; its PMIDs arrive here as ids
HUB = Form("question", "context", "final_decision", "pubid")  # qiaojin/PubMedQA
REQUIRED_NAMES = {name for form in (OURS, ORIGINAL, HUB) for name in (form.question, form.context, form.label)}


class _Unusable(Exception):
    """One field cannot be used; the message starts with a verb ("is missing")."""


def check_record(
    record: object, *, known_labels: Collection[str], names: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """(fields, problems): text, context, label and, where the record has one, id; a problem names its field.

    names: what the fields "question", "context" and "label" are called, where that was said.
    """
    if not isinstance(record, dict):
        return {}, [f"is {describe(record)}, not an object with fields"]
    form = _form_of(record, names or {})
    checks: list[tuple[str, str, Callable[[object], str]]] = [
        ("text", form.question, _text),
        ("context", form.context, _context),
        ("label", form.label, lambda value: _label(value, known_labels)),
        ("id", form.id, _name),
    ]
    fields: dict[str, str] = {"context": ""} if form.context == NO_CONTEXT else {}
    problems = []
    for field, name, check in checks:
        if field in fields or (name not in record and field == "id"):
            continue
        try:
            fields[field] = check(_present(record, name))
        except _Unusable as problem:
            problems.append(f"{name} {problem}")
    return fields, problems


def describe(value: object) -> str:
    """A JSON value, as an error names it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and isnan(value):
        return "NaN (a missing value)"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def clip(value: str) -> str:
    """A value on one line of at most CLIP characters, quoted."""
    return repr(value if len(value) <= CLIP else value[: CLIP - 3] + "...")


def _form_of(record: dict, names: Mapping[str, str]) -> Form:
    # The spelling that most fields agree with, so that a missing field is named as its file spells it.
    forms = [replace(form, **names) for form in (OURS, HUB, ORIGINAL)]
    return max(forms, key=lambda form: sum(n in record for n in (form.question, form.context, form.label)))


def _present(record: dict, name: str) -> object:
    if name not in record:
        raise _Unusable("is missing")
    return record[name]


def _text(value: object) -> str:
    """A text with something in it, stripped."""
    if not isinstance(value, str):
        raise _Unusable(f"is {describe(value)}, not a text")
    if not value.strip():
        raise _Unusable("is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise _Unusable(f"holds a broken character (half a surrogate pair) at position {error.start}") from None
    return value.strip()


def _context(value: object) -> str:
    """A text, or PubMedQA's list of paragraphs (on the hub: an object around it), one a line."""
    if isinstance(value, dict) and "contexts" in value:
        value = value["contexts"]
    if not isinstance(value, list):
        return _text(value)
    strays = [describe(part) for part in value if not isinstance(part, str)]
    if strays:
        raise _Unusable(f"is a list that holds {strays[0]}; every part must be a text")
    return _text("\n".join(part.strip() for part in value))


def _label(value: object, known_labels: Collection[str]) -> str:
    label = _name(value)
    spelled = {known.casefold(): known for known in known_labels}.get(label.casefold())
    if spelled is None:
        raise _Unusable(f"is {clip(label)}; it must be {' or '.join(known_labels)}")
    return spelled


def _name(value: object) -> str:
    """Numbers serve as well: PMIDs are numbers on the hub, and so are the answers of many a quiz."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
