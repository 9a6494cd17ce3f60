"""Check a record: its fields as a question needs them, and everything that is wrong with it.

The caller adds the file and the place.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.chat_records import chat_turns, is_chat
from grpo_ds.task.options import options_of, right_letter, with_options
from grpo_ds.task.record_shapes import (
    ANSWERED,
    HUB,
    INDEXED,
    MESSAGES,
    OURS,
    PROMPT,
    FieldNames,
    has_options,
    names_of,
)
from grpo_ds.task.records import NO_CONTEXT, Unusable, context_text, describe, json_value, quote, sound_id, sound_text
from grpo_ds.task.right_answers import right_answers

Record = Mapping[str, Any]


def check_record(
    record: object,
    *,
    known_labels: Collection[str],
    names: Mapping[str, str] | None = None,
    label_needed: bool = True,
    answers: AnswerKind = "labels",
    units: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Return (fields, problems): those of a Question that the record has; each problem names its field.

    names: the names of the fields "question", "context" and "label", if they were given.
    label_needed: False accepts a record without an answer; one that is there is checked.
    answers: the kind of the right answer; "none" leaves it to the columns.
    """
    if not isinstance(record, dict):
        return {}, [f"is {describe(record)}, not an object with fields"]
    given = names or {}
    found = names_of(record, given, answers=answers)
    fields: dict[str, Any] = {"context": ""}
    problems: list[str] = []

    def check(name: str, read: Callable[[Any], dict[str, Any]], *, needed: bool) -> None:
        if not needed and name not in record:
            return
        try:
            fields.update(read(_present(record, name)))
        except Unusable as problem:
            problems.append(f"{name} {problem}")

    options = _options(record, known_labels, problems)
    check(found.question, _asked, needed=True)
    if found.context != NO_CONTEXT:
        check(found.context, lambda value: {"context": context_text(value)}, needed=found.context_needed)
    if answers != "none" and options is not None:
        answer = lambda value: _answer(value, options, answers, known_labels, units)  # noqa: E731
        check(found.label, answer, needed=label_needed)
    check(found.id, lambda value: {"id": sound_id(value)}, needed=False)
    if options and "text" in fields:
        fields["text"] = with_options(fields["text"], options)
    if answers == "labels" and "label" in fields and "label" not in given:
        others = _other_labels(record, found)
        problems += _contradictions(record, found.label, fields["label"], others, options or {}, known_labels)
    return fields, problems


def chat_text(messages: object) -> str:
    """Return a chat as one text, to compare it with others."""
    return json.dumps(messages, sort_keys=True) if messages else ""


def _present(record: Record, name: str) -> object:
    if name not in record:
        raise Unusable("is missing")
    return record[name]


def _options(record: Record, known_labels: Collection[str], problems: list[str]) -> dict[str, str] | None:
    """Return letter -> option; None, and a problem more, if they cannot be used."""
    try:
        return options_of(record, known_labels) if has_options(record) else {}
    except Unusable as problem:
        problems.append(str(problem))
        return None


def _asked(value: object) -> dict[str, Any]:
    """Return the question, and the turns if it is a chat; its text is then the last turn."""
    value = _chat_in(value) or value
    if not is_chat(value):
        return {"text": sound_text(value)}
    turns = chat_turns(value)  # type: ignore[arg-type]
    return {"text": turns[-1]["content"], "messages": turns}


def _chat_in(value: object) -> object:
    """Return the chat that a column of texts holds as JSON, else None."""
    chat = json_value(value) if isinstance(value, str) else None
    return chat if isinstance(chat, list) and all(isinstance(turn, dict) and "role" in turn for turn in chat) else None


def _answer(
    value: object,
    options: Mapping[str, str],
    answers: AnswerKind,
    known_labels: Collection[str],
    units: Sequence[str],
) -> dict[str, Any]:
    """Return the right answer, and all accepted ones where a text may be any of several."""
    if options and answers in ("labels", "text"):
        letter = right_letter(value, options)
        if answers == "text":
            return {"label": letter, "accepted": (letter, options[letter])}
        value = letter
    accepted = right_answers(value, answers=answers, known_labels=known_labels, units=units)
    return {"label": accepted[0], **({"accepted": accepted} if answers == "text" else {})}


def _other_labels(record: Record, found: FieldNames) -> set[str]:
    """Return the other fields that hold the right answer, too: those of other shapes."""
    both = {INDEXED.label, ANSWERED.label} if found.label in (INDEXED.label, ANSWERED.label) else set()
    mine = {OURS.label, HUB.label} if found.question not in (PROMPT.question, MESSAGES.question) else set()
    return (both | mine) & record.keys() - {found.label}


def _contradictions(
    record: Record,
    name: str,
    label: str,
    others: Collection[str],
    options: Mapping[str, str],
    known_labels: Collection[str],
) -> Iterator[str]:
    """Yield a problem for each other field of the right answer that holds another one."""
    for other_name in sorted(others):
        with suppress(Unusable):
            if (other := _answer(record[other_name], options, "labels", known_labels, ())["label"]) != label:
                yield f"{name} says {quote(label)} and {other_name} {quote(other)}; choose with --label_field"
