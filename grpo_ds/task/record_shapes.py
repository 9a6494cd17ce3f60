"""Shapes of a record: under which names data sets keep question, context, right answer and id.

A record's own fields decide, so one file may mix shapes; flags replace single names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.records import NO_CONTEXT


@dataclass(frozen=True, slots=True)
class FieldNames:
    """Names of a record's fields in one of the known shapes.

    Example: a record of GSM8K.
        >>> names_of({"question": "6 times 7?", "answer": "It is 42.\\n#### 42"}, {})
        FieldNames(question='question', context='context', label='answer', id='id', context_needed=False)
    """

    question: str
    context: str
    label: str
    id: str
    context_needed: bool = True  # a record without one is refused


OURS = FieldNames("question", "context", "ground_truth", "id")
ORIGINAL = FieldNames("QUESTION", "CONTEXTS", "final_decision", "id")  # ori_pqal.json; its PMIDs become ids before this
HUB = FieldNames("question", "context", "final_decision", "pubid")  # qiaojin/PubMedQA
ANSWERED = FieldNames("question", "context", "answer", "id", context_needed=False)  # GSM8K, MMLU
INDEXED = FieldNames("question", "context", "answer_idx", "id", context_needed=False)  # MedQA; its answer is a text
PROMPT = FieldNames("prompt", NO_CONTEXT, "ground_truth", "id", context_needed=False)  # TRL
MESSAGES = FieldNames("messages", NO_CONTEXT, "ground_truth", "id", context_needed=False)
PROMPT_LABELS = ("ground_truth", "answer", "solution", "final_decision")  # of a prompt, the first one that is there
OPTIONS = ("options", "choices")  # of MedQA and of MMLU
REQUIRED_NAMES = {name for names in (OURS, ORIGINAL, HUB) for name in (names.question, names.context, names.label)}
RECORD_NAMES = {*REQUIRED_NAMES, *OPTIONS, PROMPT.question, MESSAGES.question, ANSWERED.label}


def names_of(record: Mapping[str, Any], given: Mapping[str, str], *, answers: AnswerKind = "labels") -> FieldNames:
    """Return the names of the record's fields; those that it should have are in it, too.

    given: names of "question", "context" and "label" that flags set.
    """
    if "question" not in given and not {OURS.question, ORIGINAL.question} & record.keys():
        for shape in (PROMPT, MESSAGES):
            if shape.question in record:
                return _named(_with_label(shape, record), given)
    shapes = [_named(shape, given) for shape in (OURS, HUB, ORIGINAL, INDEXED, ANSWERED)]
    if (answers != "labels" or has_options(record)) and not any(shape.label in record for shape in shapes):
        shapes.reverse()  # so that the missing answer is called `answer`
    # The shape with the most fields in the record, so that a missing field is named in the file's spelling.
    found = max(shapes, key=lambda shape: sum(n in record for n in (shape.question, shape.context, shape.label)))
    optional = answers != "labels" or has_options(record) or {"question", "label"} <= given.keys()
    return replace(found, context_needed="context" in given or (found.context_needed and not optional))


def has_options(record: Mapping[str, Any]) -> bool:
    """Return True if the record has options to choose from, in one field or in columns A, B, ..."""
    return any(name in record for name in OPTIONS) or {"A", "B"} <= record.keys()


def _named(shape: FieldNames, given: Mapping[str, str]) -> FieldNames:
    question, context, label = (given.get(it, getattr(shape, it)) for it in ("question", "context", "label"))
    return replace(shape, question=question, context=context, label=label)


def _with_label(shape: FieldNames, record: Mapping[str, Any]) -> FieldNames:
    return replace(shape, label=next((name for name in PROMPT_LABELS if name in record), shape.label))
