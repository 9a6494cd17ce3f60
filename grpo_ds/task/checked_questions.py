"""Records of a source as questions, or one error that names every bad record and says what to do."""

import hashlib
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo_ds.errors import DataError, one_error
from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.question import Question
from grpo_ds.task.record_checks import chat_text, check_record
from grpo_ds.task.record_remedies import remedy_for
from grpo_ds.task.records import quote
from grpo_ds.task.sources import Source
from grpo_ds.task.spelling import label_key, nfc

PUBMEDQA_LABELS = ("yes", "no", "maybe")


def checked_questions(
    source: Source,
    labels: tuple[str, ...],
    fields: Mapping[str, str],
    *,
    label_needed: bool = True,
    answers: AnswerKind = "labels",
    units: Sequence[str] = (),
) -> list[Question]:
    """Return a question for each record, or raise one DataError that names every bad record."""
    # If all labels are PubMedQA's, its other labels are accepted here and left out later; otherwise they are errors.
    asked = {label_key(label) for label in labels}
    others = [label for label in PUBMEDQA_LABELS if label not in asked] if asked <= set(PUBMEDQA_LABELS) else []
    found, problems = _check_all(source, (*labels, *others), fields, label_needed, answers, units)
    if problems:
        headline = (
            f"{source.name}: {counted(len(problems), 'problem')} ({counted(len(source.records), 'record')} read):"
        )
        optional = "" if label_needed else " Labels may be missing."
        mostly_bad = len(found) < len(source.records) / 2
        remedy = remedy_for(source, labels, fields, answers, mostly_bad=mostly_bad, label_needed=label_needed)
        raise one_error(DataError, headline, problems, remedy + optional)
    return found


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _check_all(
    source: Source,
    known_labels: tuple[str, ...],
    names: Mapping[str, str],
    label_needed: bool,
    answers: AnswerKind,
    units: Sequence[str],
) -> tuple[list[Question], list[str]]:
    """Return the usable records as questions, and every problem of the others with its place."""
    placed, problems = [], list(source.problems)
    columns = {name: None for _, record in source.records if isinstance(record, dict) for name in record}
    for place, record in source.records:
        fields, wrong = check_record(
            record, known_labels=known_labels, names=names, label_needed=label_needed, answers=answers, units=units
        )
        if isinstance(record, dict) and not wrong:
            # A view of the two dicts: if every record has a different field, copies would fill the memory.
            placed.append((place, _question(fields, ChainMap(record, columns))))
        else:
            problems.append(f"{place}: {', '.join(wrong)}" if isinstance(record, dict) else f"{place} {wrong[0]}")
    return [question for _, question in placed], [*problems, *_duplicates(placed)]


def _question(fields: dict[str, Any], columns: Mapping[str, Any]) -> Question:
    content = f"{fields['text']}\n{fields['context']}{chat_text(fields.get('messages'))}".encode()
    return Question(**{"id": hashlib.sha256(content).hexdigest()[:12], "label": "", **fields}, columns=columns)


def _duplicates(placed: Sequence[tuple[str, Question]]) -> Iterator[str]:
    """Yield a problem for each record that appears twice: it could be both trained on and held out."""
    by_id: dict[str, tuple[str, str]] = {}
    by_content: dict[tuple[str, str, str], tuple[str, str]] = {}
    for place, question in placed:
        content, own_id = (nfc(question.text), nfc(question.context), chat_text(question.messages)), nfc(question.id)
        if content in by_content:
            first, label = by_content[content]
            yield f"{place}: same question and context as {first}{_conflict(label, question.label)}; remove one"
        elif own_id in by_id:
            first, label = by_id[own_id]
            conflict = _conflict(label, question.label)
            yield f"{place}: id {quote(question.id)} is taken by {first}{conflict}; ids must differ"
        by_id.setdefault(own_id, (place, question.label))
        by_content.setdefault(content, (place, question.label))


def _conflict(first: str, label: str) -> str:
    return "" if first == label else f", but its answer is {quote(first)}, not {quote(label)}"
