"""What a record is: three spellings of its fields, and every check of one record, with no file in sight.

`check_record` returns the fields or all that is wrong with them; who calls it knows the file and the place.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite, isnan

NO_CONTEXT = "none"  # in place of the name of a context's field: the questions stand alone
CLIP = 40  # characters of a bad value that an error repeats
LONGEST_ID = 200  # characters: errors and reports name a record by its id, on one line
# What damaged files leave behind: control characters that lay nothing out (an old code page read as another, a tape's
# end), half a surrogate pair, which JSON can spell and no tokenizer takes, U+FFFD in place of what could not be read.
BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd-\uffff]")
UNSEEN = "\ufeff\u200b"  # byte order mark and zero-width space: around a text they are white space


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


class Unusable(Exception):
    """One field cannot be used; the message starts with a verb ("is missing")."""


def check_record(
    record: object,
    *,
    known_labels: Collection[str],
    names: Mapping[str, str] | None = None,
    label_needed: bool = True,
) -> tuple[dict[str, str], list[str]]:
    """(fields, problems): text, context, label and, where the record has one, id; a problem names its field.

    names: what the fields "question", "context" and "label" are called, where that was said.
    """
    if not isinstance(record, dict):
        return {}, [f"is {describe(record)}, not an object with fields"]
    form = _form_of(record, names or {})
    checks: list[tuple[str, str, Callable[[object], str]]] = [
        ("text", form.question, sound_text),
        ("context", form.context, _context),
        ("label", form.label, lambda value: _label(value, known_labels)),
        ("id", form.id, _id),
    ]
    fields: dict[str, str] = {"context": ""} if form.context == NO_CONTEXT else {}
    problems, optional = [], {"id"} if label_needed else {"id", "label"}
    for field, name, check in checks:
        if field in fields or (name not in record and field in optional):
            continue
        try:
            fields[field] = check(_present(record, name))
        except Unusable as problem:
            problems.append(f"{name} {problem}")
    if "label" in fields and "label" not in (names or {}):
        problems += _rivals(record, form.label, fields["label"], known_labels)
    return fields, problems


def describe(value: object) -> str:
    """A JSON value, as an error names it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN (a missing value)" if isnan(value) else "infinity"
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


def sound_text(value: object) -> str:
    """A text with something to see in it and nothing broken, stripped. Raises Unusable."""
    if not isinstance(value, str):
        raise Unusable(f"is {describe(value)}, not a text")
    if broken := BROKEN.search(value):
        raise Unusable(f"holds a broken character, U+{ord(broken[0]):04X}, at position {broken.start()}")
    if not any(character.isprintable() and character != " " for character in value):
        raise Unusable("is empty")
    return value.strip().strip(UNSEEN).strip()


def _present(record: dict, name: str) -> object:
    if name not in record:
        raise Unusable("is missing")
    return record[name]


def _rivals(record: dict, name: str, label: str, known_labels: Collection[str]) -> Iterator[str]:
    """The field that another spelling reads the answer from, where it holds another answer: which is right?"""
    for rival in {OURS.label, HUB.label} & set(record) - {name}:
        with suppress(Unusable):
            if (other := _label(record[rival], known_labels)) != label:
                yield f"{name} says {clip(label)} and {rival} {clip(other)}; choose with --label_field"


def _context(value: object) -> str:
    """A text, or PubMedQA's list of paragraphs (on the hub: an object around it), one a line."""
    if isinstance(value, dict) and "contexts" in value:
        value = value["contexts"]
    if not isinstance(value, list):
        return sound_text(value)
    strays = [describe(part) for part in value if not isinstance(part, str)]
    if strays:
        raise Unusable(f"is a list that holds {strays[0]}; every part must be a text")
    return sound_text("\n".join(part.strip() for part in value))


def _label(value: object, known_labels: Collection[str]) -> str:
    label = _name(value)
    spelled = {known.casefold(): known for known in known_labels}.get(label.casefold())
    if spelled is None:
        raise Unusable(f"is {clip(label)}; it must be {' or '.join(known_labels)}")
    return spelled


def _name(value: object) -> str:
    """Numbers serve as well: PMIDs are numbers on the hub, and so are the answers of many a quiz."""
    if isinstance(value, float) and isfinite(value):
        raise Unusable(f"is {value}, but a number here must be whole (1, not 1.0)")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else sound_text(value)


def _id(value: object) -> str:
    name = _name(value)
    if len(name) > LONGEST_ID or len(name.splitlines()) > 1:
        raise Unusable(f"is {clip(name)}; it must be one line of at most {LONGEST_ID} characters")
    return name
