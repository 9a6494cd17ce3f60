"""The right answer of a record, by the kind of answers: a label, a number, or texts of which each is right."""

from collections.abc import Collection, Sequence
from decimal import Decimal
from fractions import Fraction
from math import isfinite

from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.numbers import number_of, number_text
from grpo_ds.task.records import Unusable, describe, quote, text_or_integer
from grpo_ds.task.spelling import label_key, text_key

FINAL = "####"  # in GSM8K the last line of an answer is this mark and the answer itself


def right_answers(
    value: object, *, answers: AnswerKind, known_labels: Collection[str] = (), units: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the accepted answers, the first one spelled as prompts and reports show it. units: of a number.

    Raises Unusable with what is wrong with the value.
    """
    if answers == "number":
        return (number_text(_number(value, units)),)
    if answers == "text" and isinstance(value, list):
        return tuple(dict.fromkeys(map(_one_of_several, value))) or _none_of_several()
    text = final_answer(value)
    return (_with_words(text),) if answers == "text" else (_label(text, known_labels),)


def final_answer(value: object) -> str:
    """Return the text behind "####" in the last line, or the complete text if there is no such line.

    The truth values of JSON and Parquet (BoolQ) are the texts true and false.
    """
    text = text_or_integer(str(value).lower() if isinstance(value, bool) else value)
    last = text.rpartition("\n")[2].strip()
    if not last.startswith(FINAL):
        return text
    if not (final := last.removeprefix(FINAL).strip()):
        raise Unusable(f"has nothing behind its {FINAL}")
    return final


def _number(value: object, units: Sequence[str]) -> Fraction:
    is_number = isinstance(value, int | Decimal) or (isinstance(value, float) and isfinite(value))
    if isinstance(value, bool) or not (is_number or isinstance(value, str)):
        raise Unusable(f"is {describe(value)}, not a number")
    # A float is the decimal that its file shows; Parquet has exact decimals, too.
    text = format(Decimal(str(value)), "f") if isinstance(value, float | Decimal) else final_answer(value)
    number = number_of(text, units)
    if number is None:
        raise Unusable(f"is {quote(text)}, which is not a number{_hint(text, units)}")
    return number


def _hint(text: str, units: Sequence[str]) -> str:
    """Say what was probably meant by a text that is not a number."""
    if FINAL in text:
        return f"; {FINAL} must begin its last line"
    with_point = text.translate(str.maketrans(",.", ".,"))
    return f"; if {with_point} is meant, write that" if number_of(with_point, units) is not None else ""


def _label(label: str, known_labels: Collection[str]) -> str:
    spelled = {label_key(known): known for known in known_labels}.get(label_key(label))
    if spelled is None:
        raise Unusable(f"is {quote(label)}; it must be {' or '.join(known_labels)}")
    return spelled


def _one_of_several(value: object) -> str:
    if not isinstance(value, str | int):
        raise Unusable(f"is a list that holds {describe(value)}; every part must be a text")
    return _with_words(text_or_integer(value))


def _with_words(text: str) -> str:
    if not text_key(text):
        raise Unusable(f"is {quote(text)}, which holds no word, so that no answer could be equal to it")
    return text


def _none_of_several() -> tuple[str, ...]:
    raise Unusable("is an empty list")
