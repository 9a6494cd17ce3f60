"""Options of a question (MedQA, MMLU): put into its text, and the right one as its letter."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from grpo_ds.task.chat_records import is_chat
from grpo_ds.task.record_shapes import OPTIONS
from grpo_ds.task.records import Unusable, describe, quote, text_or_integer
from grpo_ds.task.spelling import label_key

NO_LIST = 'not a list; a table may hold it as JSON: ["first", "second"]'


def options_of(record: Mapping[str, Any], known_labels: Collection[str]) -> dict[str, str]:
    """Return letter -> option, empty if there are none. Raises Unusable, whose message names the field.

    Options stand in a list, a mapping, or in columns A, B, C, ... Those that are the labels themselves ("yes", "no")
    are no options to choose by letter.
    """
    name = next((name for name in OPTIONS if name in record), "")
    value = record[name] if name else _columns(record)
    if _is_prose(value):
        return {}
    if not isinstance(value, list | dict):
        raise Unusable(f"{name} is {describe(value)}, {NO_LIST}")
    if len(value) > len(ascii_uppercase):
        raise Unusable(f"{name} has {len(value)} options, more than there are letters")
    given = dict(zip(ascii_uppercase, value, strict=False)) if isinstance(value, list) else value
    found = {letter: _option(f"{name}[{letter}]", text) for letter, text in given.items() if text is not None}
    if not found:
        raise Unusable(f"{name} holds no option")
    labels = {*map(label_key, known_labels)}
    are_labels = {*map(label_key, found.values())} <= labels and not {*map(label_key, found)} <= labels
    return {} if are_labels else found


def with_options(question: str, options: Mapping[str, str]) -> str:
    """Return the question with an option a line below it: "A. aspirin"."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def unused_options(records: Sequence[object], question_field: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Return a warning for each column of options that no prompt shows, with the reason.

    question_field: returns the name of a record's question, which may be a chat.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for record in records:
        if isinstance(record, dict):
            for name, value in record.items():
                if value is not None and label_key(str(name)) in OPTIONS:
                    counts[name, _why_unused(name, value, record, question_field(record))] += 1
    return [
        f"Warning: {name!r} is not in the prompts of {count} of {len(records)} records: {why}."
        for (name, why), count in counts.items()
        if why
    ]


def _why_unused(name: str, value: object, record: Mapping[str, Any], question_field: str) -> str:
    """Return why these options are not put into the question; "" if they are."""
    if name not in OPTIONS:
        return f"the column must be called {label_key(name)!r}"
    if name != next(other for other in OPTIONS if other in record):
        return f"{OPTIONS[0]!r} is taken"
    if is_chat(record.get(question_field)):
        return "a chat is not changed"
    return f"it is a text, {NO_LIST}" if _is_prose(value) else ""


def _is_prose(value: object) -> bool:
    """True for a text for people, such as "A) aspirin B) none"."""
    return isinstance(value, str) and not value.lstrip().startswith(("[", "{"))


def right_letter(value: object, options: Mapping[str, str]) -> str:
    """Return the letter of the right option, which the record gives as letter, as text or as index from 0.

    Raises Unusable if that is no option, or if a text such as "2" is one option and the index of another.
    """
    text, last = text_or_integer(value), f"{len(options)} options, {next(iter(options))} to {list(options)[-1]}"
    letter = next((it for it in options if label_key(it) == label_key(text)), None)
    named = [it for it in options if label_key(options[it]) == label_key(text)]
    counted = [*options][int(text)] if text.isdecimal() and int(text) < len(options) else None
    if letter or isinstance(value, int):
        found = letter or counted
    elif named and counted and counted not in named:
        raise Unusable(f"is {quote(text)}, the text of option {named[0]} and the index of {counted}; give the letter")
    else:
        found = named[0] if len(named) == 1 else None if named else counted
    if found is None:
        raise Unusable(f"is {quote(text)}, but there are only {last}" + "; an index counts from 0" * text.isdecimal())
    return found


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns A, B, C, ... as far as the record has them without a gap."""
    count = next((place for place, letter in enumerate(ascii_uppercase) if letter not in record), len(ascii_uppercase))
    return {letter: record[letter] for letter in ascii_uppercase[:count]} if count > 1 else {}


def _option(name: str, value: object) -> str:
    try:
        return str(value) if isinstance(value, float) else text_or_integer(value)
    except Unusable as problem:
        raise Unusable(f"{name} {problem}") from None
