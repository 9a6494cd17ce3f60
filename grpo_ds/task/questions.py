"""Read questions, split them into training and held-out ones, and choose the questions of a step.

The split depends only on (seed, ids), the choice only on (seed, step). So there is no sampler state to save, and a
resumed run asks the same questions as an uninterrupted one.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from math import ceil, floor
from random import Random

from grpo_ds.errors import DataError, UsageError
from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.checked_questions import checked_questions, counted
from grpo_ds.task.options import options_of, unused_options
from grpo_ds.task.question import Question
from grpo_ds.task.record_checks import chat_text
from grpo_ds.task.record_remedies import forgotten_context
from grpo_ds.task.record_shapes import OPTIONS, names_of
from grpo_ds.task.sources import EXAMPLES, Source, open_source
from grpo_ds.task.spelling import label_key

NOUNS: dict[AnswerKind, tuple[str, str]] = {  # of a data set without classes: what it holds, and the answers
    "number": ("question", " (answers are numbers)"),
    "text": ("question", " (answers are texts)"),
    "none": ("prompt", ""),
}


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The usable questions of a source.

    Example: the packaged records.
        >>> questions = read_questions("sample")
        >>> questions.source, questions.questions[0].label, questions.left_out
        ('sample: 160 questions (80 yes, 80 no)', 'yes', {})
    """

    questions: tuple[Question, ...]  # in the order of the file
    source: str  # name and counts, on one line
    left_out: dict[str, int]  # number of records by label, for PubMedQA labels that are not among `labels`
    form: str = ""  # how it was read: the form of the file, and the fields taken
    warnings: tuple[str, ...] = ()  # columns that look like options or contexts, and are in no prompt


def read_questions(
    data: str | Source | None,
    *,
    labels: tuple[str, ...] = ("yes", "no"),
    fields: Mapping[str, str] | None = None,
    answers: AnswerKind = "labels",
    units: Sequence[str] = (),
) -> QuestionSet:
    """Read --data (file, hub id, "sample", None for the default). Raises one DataError for all bad records.

    data: or records that were read already.

    labels: the answers to keep, if the answers are labels.
    fields: names of a record's fields for "question", "context" and "label"; a name that is not given is detected.
    answers: the kind of the right answers; with "none" a record needs none. units: of numbers.
    """
    source = data if isinstance(data, Source) else open_source(data, answers)
    found = checked_questions(source, labels, fields or {}, answers=answers, units=units)
    if not found:
        raise DataError(f"{source.name} has no records.\n{EXAMPLES[answers]}")
    form = _form(source, labels, fields or {}, answers)
    records = [record for _, record in source.records]
    asked = lambda record: names_of(record, fields or {}, answers=answers).question  # noqa: E731
    warnings = tuple(unused_options(records, asked))
    if answers == "labels" and not any(question.context or question.messages for question in found):
        warnings += tuple(filter(None, [forgotten_context(records, fields or {})]))
    if answers != "labels":
        noun, kind = NOUNS[answers]
        return QuestionSet(tuple(found), f"{source.name}: {counted(len(found), noun)}{kind}", {}, form, warnings)
    kept = tuple(question for question in found if question.label in labels)
    left_out = dict(Counter(question.label for question in found if question.label not in labels))
    if not kept:
        raise _none_left(source.name, labels, left_out)
    return QuestionSet(kept, _summary(source.name, kept, labels, left_out), left_out, form, warnings)


def unanswered_questions(
    source: Source,
    *,
    labels: tuple[str, ...] = ("yes", "no"),
    fields: Mapping[str, str] | None = None,
    answers: AnswerKind = "labels",
    units: Sequence[str] = (),
) -> list[Question]:
    """Questions of a source that may have no labels; a missing label becomes ""."""
    if found := checked_questions(source, labels, fields or {}, label_needed=False, answers=answers, units=units):
        return found
    raise DataError(f"{source.name} has no records.\n{EXAMPLES[answers]}")


@cache  # a command compares its questions with the record several times
def fingerprint(question: Question) -> str:
    """Return a hash of question, context and turns, 12 hex digits, which case, spacing and Unicode form do not change.

    48 bits: the chance that any of 10,000 new questions has the hash of one of 200,000 others is 1e-5.
    """
    turns = [chat_text(question.messages)] if len(question.messages) > 1 else []
    parts = (label_key(part).split() for part in (question.text, question.context, *turns))
    return hashlib.sha256("\n".join(map(" ".join, parts)).encode()).hexdigest()[:12]


def not_among(trained_on: Collection[str], questions: Sequence[Question]) -> list[Question]:
    """Return the questions whose fingerprint is not in `trained_on`."""
    return [q for q in questions if fingerprint(q) not in trained_on] if trained_on else list(questions)


def in_random_order(questions: Sequence[Question], *, seed: int) -> list[Question]:
    """Return the questions in an order that depends on seed and ids only; a shuffle would depend on other records."""
    return sorted(questions, key=lambda question: hashlib.sha256(f"{seed}/{question.id}".encode()).digest())


def split_questions(
    questions: Sequence[Question],
    *,
    eval_fraction: float,
    seed: int,
    trained_on: Collection[str] = (),
    by_class: bool = True,
) -> tuple[list[Question], list[Question]]:
    """Split into (training, held-out), stratified by class; the order of the records does not matter.

    Each class gives its share to the held-out part, rounded by largest remainder. So the sizes are exact: 500 records
    at 0.2 give 400 and 100, for any mix of classes.

    trained_on: fingerprints of questions that are never held out, even if the held-out part then stays smaller.
    by_class: False for answers that are no closed set: the random order alone decides.
    """
    if not 0 < eval_fraction < 1:
        raise UsageError(f"eval_fraction is {eval_fraction}, but it must lie between 0 and 1. Try --eval_fraction 0.2.")
    mixed = in_random_order(questions, seed=seed)
    by_label = defaultdict(list)
    for question in not_among(trained_on, mixed):
        by_label[_class(question, by_class)].append(question.id)
    places = _held_out_places(Counter(_class(question, by_class) for question in mixed), eval_fraction)
    held_out = {id_ for label, ids in by_label.items() for id_ in ids[: places[label]]}
    return [q for q in mixed if q.id not in held_out], [q for q in mixed if q.id in held_out]


def first_in_proportion(questions: Sequence[Question], limit: int | None, *, by_class: bool = True) -> list[Question]:
    """Return the first `limit` questions, the classes in the proportion of all (largest remainder); None: all.

    by_class: False for answers that are no closed set.
    """
    if limit is None or limit >= len(questions) or not by_class:
        return list(questions[:limit])
    left = _apportion(Counter(question.label for question in questions), Fraction(limit, len(questions)), limit)
    chosen = []
    for question in questions:
        if left[question.label]:
            left[question.label] -= 1
            chosen.append(question)
    return chosen


def questions_at(
    step: int, questions: Sequence[Question], *, per_step: int, seed: int, balanced: bool = False
) -> list[Question]:
    """Choose the questions of one step (from 0), for all ranks.

    Questions form an endless sequence of epochs; epoch e is a permutation seeded by (seed, e). Each step takes the next
    `per_step` questions, so every question comes once per epoch, and a step may be in two epochs.

    balanced: take the questions from the classes in turn; each class has its own sequence of epochs. The classes
        of a step then differ by at most one question, and questions of a smaller class come more often.
    """
    labels = sorted({question.label for question in questions})
    pools = [[q for q in questions if q.label == label] for label in labels] if balanced else [questions]
    asked = []
    for place in range(step * per_step, (step + 1) * per_step):
        turn, kind = divmod(place, len(pools))
        count = len(pools[kind])
        asked.append(pools[kind][_permutation(count, seed, turn // count)[turn % count]])
    return asked


def _class(question: Question, by_class: bool) -> str:
    return question.label if by_class else ""


@lru_cache(maxsize=8)  # a step needs at most two epochs of each class, unless they are tiny
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(Random(f"{seed}/{epoch}").sample(range(count), count))


def _held_out_places(counts: Mapping[str, int], eval_fraction: float) -> dict[str, int]:
    """Number of held-out records of each class."""
    fraction = Fraction(str(eval_fraction))  # exact: 0.29 * 100 is 28.999999999999996 in floats
    total = _held_out_count(sum(counts.values()), fraction)
    if not 0 < total < sum(counts.values()):
        raise DataError(
            f"{sum(counts.values())} records cannot be split: --eval_fraction {eval_fraction} leaves one part empty.\n"
            f"It needs at least {_fewest_to_split(fraction)} records: add records, or change --eval_fraction."
        )
    return _apportion(counts, fraction, total)


def _apportion(counts: Mapping[str, int], fraction: Fraction, total: int) -> dict[str, int]:
    """Distribute `total` places, which is sum(counts) * fraction rounded, among the classes (largest remainder)."""
    shares = {label: floor(count * fraction) for label, count in counts.items()}
    by_remainder = sorted(counts, key=lambda label: (shares[label] - counts[label] * fraction, label))
    for label in by_remainder[: total - sum(shares.values())]:
        shares[label] += 1
    return shares


def _held_out_count(count: int, fraction: Fraction) -> int:
    return floor(count * fraction + Fraction(1, 2))


def _fewest_to_split(fraction: Fraction) -> int:
    """Smallest number of records that leaves both parts of the split with a record."""
    return max(ceil(1 / (2 * fraction)), floor(1 / (2 * (1 - fraction))) + 1)


def _none_left(name: str, labels: Sequence[str], left_out: dict[str, int]) -> DataError:
    counts = ", ".join(f"{count} {label}" for label, count in left_out.items())
    everything = ",".join(dict.fromkeys([*labels, *left_out]))
    return DataError(f"{name} has no record labelled {' or '.join(labels)}, only {counts}.\nTry --labels {everything}.")


def _summary(name: str, kept: Sequence[Question], labels: Sequence[str], left_out: dict[str, int]) -> str:
    actual = Counter(question.label for question in kept)
    mix = ", ".join(f"{actual[label]} {label}" for label in labels)
    rest = "".join(f", {count} {label} left out" for label, count in left_out.items())
    return f"{name}: {counted(len(kept), 'question')} ({mix}{rest})"


def _form(source: Source, labels: Sequence[str], given: Mapping[str, str], answers: AnswerKind) -> str:
    """Say in a few words how the source was read, by the fields that most of its records have."""
    counts: Counter[str] = Counter()
    for _, record in source.records:
        if isinstance(record, dict):
            names = names_of(record, given, answers=answers)
            options = next((f"options {name!r}" for name in OPTIONS if name in record), "")
            options += " left out" * bool(options and not options_of(record, labels))
            taken = [f"question {names.question!r}", options, f"context {names.context!r}" * (names.context in record)]
            taken.append(f"answer {names.label!r}" * (answers != "none"))
            counts[", ".join(filter(None, taken))] += 1
    (most, count), others = counts.most_common(1)[0], len(counts) - 1
    mixed = f" in {count} of {len(source.records)} records, {counted(others, 'other shape')}" * bool(others)
    return f"{source.form}; {most}{mixed}"
