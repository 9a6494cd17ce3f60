"""Find remedies for records that cannot be used: the flag that reads them if there is one, else a record that works."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.numbers import number_of
from grpo_ds.task.options import options_of, right_letter
from grpo_ds.task.record_shapes import has_options, names_of
from grpo_ds.task.records import NO_CONTEXT, Unusable, quote
from grpo_ds.task.right_answers import final_answer
from grpo_ds.task.sources import ACCEPTED, FORMS, Source
from grpo_ds.task.spelling import label_key

MOST_LABELS, LONGEST_LABEL = 10, 20  # of answers that could be labels
SHOWN_FIELDS = 8
FLAGS = "--question_field, --context_field NAME|none, --label_field"
EXAMPLES: dict[AnswerKind, str] = {
    "labels": ACCEPTED,
    "number": f'Records: {{"question": "...", "answer": "42", or "...\\n#### 42" as in GSM8K}}, {FORMS}.',
    "text": f'Records: {{"question": "...", "answer": "a text", or a list of accepted texts}}, {FORMS}.',
    "none": f'Records: {{"prompt": "..."}}, or turns {{"role", "content"}} as "prompt" or "messages", {FORMS}.',
}
WORDS = {  # role -> words that data sets in several languages use for it, without case
    "question": ("question", "frage", "pregunta", "domanda", "problem", "query", "input", "instruction", "prompt"),
    "label": ("answer", "label", "antwort", "respuesta", "risposta", "solution", "target", "output", "answerkey"),
    "context": ("context", "kontext", "contexte", "contexto", "passage", "abstract", "text"),
}


def remedy_for(
    source: Source, labels: Sequence[str], given: Mapping[str, str], answers: AnswerKind, *, mostly_bad: bool
) -> str:
    """Return the line below the problems of a source. mostly_bad: fewer than half of its records can be used."""
    records = [record for _, record in source.records if isinstance(record, dict)]
    if records and not any(names_of(record, given, answers=answers).question in record for record in records):
        return _fields_line(records) + source.advice
    if mostly_bad and answers == "labels" and (flags := _flags_for_answers(records, given)):
        return flags
    if source.advice:
        return source.advice.strip()
    if answers == "labels" and (given or not {"yes", "no"} >= set(labels)):
        return f"Labels: {' or '.join(labels)} (--labels). Fields: --question_field, --context_field, --label_field."
    return EXAMPLES[answers]


def _fields_line(records: Sequence[Mapping[str, object]]) -> str:
    """Name the fields that the records have, and the flags that say which is which."""
    names = list(dict.fromkeys(str(name) for record in records for name in record))
    shown = ", ".join(map(quote, names[:SHOWN_FIELDS])) + ", ..." * (len(names) > SHOWN_FIELDS)
    guessed = {role: next((name for name in names if label_key(name.strip()) in WORDS[role]), None) for role in WORDS}
    if guessed["question"] and guessed["label"]:
        typed = {**guessed, "context": guessed["context"] or NO_CONTEXT}
        return f"Fields: {shown}. Try {' '.join(f'--{role}_field {shlex.quote(str(typed[role]))}' for role in typed)}"
    return f"Fields: {shown or 'none'}. Name those of question, context and answer: {FLAGS}."


def _flags_for_answers(records: Sequence[Mapping[str, object]], given: Mapping[str, str]) -> str:
    """Name the flag that accepts the answers that are there; "" if the records differ too much."""
    named = [(record, names_of(record, given).label) for record in records]
    if not any(name in record for record, name in named):
        return "No record has an answer: name its field (--label_field), or --answers none if rewards need no answer."
    found: Counter[str] = Counter()
    letters: set[str] = set()
    for record, name in named:
        with suppress(Unusable):
            options = options_of(record, ()) if has_options(record) else {}
            letters.update(options)
            found[right_letter(record.get(name), options) if options else final_answer(record.get(name))] += 1
    if found.total() < len(records) or len(found) < 2:
        return ""
    shown = ", ".join(f"{count} {quote(answer)}" for answer, count in found.most_common(3)) + ", ..." * (len(found) > 3)
    labels = sorted({*found, *letters})
    short = all(len(label) <= LONGEST_LABEL and "," not in label for label in labels)
    if len(labels) <= MOST_LABELS and short and len({*map(label_key, labels)}) == len(labels):
        return f"Answers found: {shown}. Try --labels {shlex.quote(','.join(labels))}"
    kind = "number" if all(number_of(answer) is not None for answer in found) else "text"
    return f"Answers found: {shown}. Try --answers {kind}"
