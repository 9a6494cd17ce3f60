"""Find remedies for records that cannot be used: the flag that reads them if there is one, else a record that works."""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.numbers import UNIT, number_of
from grpo_ds.task.options import options_of, right_letter
from grpo_ds.task.record_shapes import has_options, names_of
from grpo_ds.task.records import NO_CONTEXT, Unusable, quote
from grpo_ds.task.right_answers import final_answer
from grpo_ds.task.sources import EXAMPLES, Source
from grpo_ds.task.spelling import label_key

MOST_LABELS, LONGEST_LABEL = 10, 20  # of answers that could be labels
MOST_UNITS = 5
AROUND_UNITS = "0123456789.,/%+-\u2212 "
SHOWN_FIELDS, SHOWN_ANSWERS = 8, 4
CONTEXT_WORDS = 5  # more than a date or a name
REASONS = {  # fields that would tell the answer
    *("explanation", "rationale", "reason", "reasoning", "cot", "solution", "long_answer", "comment"),
    *("begr\u00fcndung", "erkl\u00e4rung", "kommentar", "explicaci\u00f3n", "explication", "spiegazione"),
}
PLAIN = re.compile(r"\w[\w -]*")  # a field's name that needs no quotes
NO_ANSWER = "name the answer's field (--label_field), or --answers none if rewards need no answer"
FLAGS = "--question_field, --context_field NAME|none, --label_field"
WORDS = {  # role -> words that data sets in several languages use for it, without case
    "question": (
        *("question", "frage", "pregunta", "pergunta", "domanda", "vraag"),
        *("problem", "query", "input", "instruction", "prompt"),
    ),
    "label": (
        *("answer", "label", "antwort", "respuesta", "resposta", "r\u00e9ponse", "risposta", "antwoord"),
        *("solution", "target", "output", "answerkey"),
    ),
    "context": (
        *("context", "kontext", "contexte", "contexto", "passage", "abstract", "text", "summary", "evidence"),
        *("kurzfassung", "zusammenfassung", "r\u00e9sum\u00e9", "resumen", "resumo", "riassunto", "samenvatting"),
    ),
}


def remedy_for(
    source: Source,
    labels: Sequence[str],
    given: Mapping[str, str],
    answers: AnswerKind,
    *,
    mostly_bad: bool,
    label_needed: bool = True,
) -> str:
    """Return the line below the problems of a source. mostly_bad: fewer than half of its records can be used."""
    records = [record for _, record in source.records if isinstance(record, dict)]
    if not records and any(isinstance(value, list) for _, value in source.records):
        return f"Save the list of records alone, without an object around it. {EXAMPLES[answers]}"
    if missing := _missing_roles(records, given, label_needed=label_needed and answers != "none", answers=answers):
        closed = labels if label_needed and answers == "labels" else ()
        found = _fields_line(records, missing, given, closed)  # which flags read, if the fields could be told apart
        return found if "; try " in found else f"{found} {source.advice}".rstrip()
    if mostly_bad and label_needed and answers == "labels" and (said := _answers_found(records, given)):
        return said
    if mostly_bad and answers == "number" and (units := _units(records, given)):
        return f"Try --units {shlex.quote(','.join(units))}"
    if source.problems and source.advice:
        return source.advice
    if answers == "labels" and (given or not {"yes", "no"} >= set(labels)):
        return f"Labels: {' or '.join(labels)} (--labels). Fields: --question_field, --context_field, --label_field."
    return EXAMPLES[answers]


def _missing_roles(
    records: Sequence[Mapping[str, object]], given: Mapping[str, str], *, answers: AnswerKind, label_needed: bool
) -> tuple[str, ...]:
    """Return the roles whose field no record has, although each needs it; all three if it is the question's."""
    named = [(record, names_of(record, given, answers=answers)) for record in records]
    if not any(names.question in record for record, names in named):
        return tuple(role for role in WORDS if role != "label" or label_needed) if records else ()
    if not any(record.keys() - {names.question, names.id} for record, names in named):
        return ()  # no field is left that could be another one
    in_context = all(names.context_needed and names.context != NO_CONTEXT for _, names in named)
    needed = {"label": label_needed, "context": in_context}
    return tuple(
        role for role in needed if needed[role] and not any(getattr(names, role) in record for record, names in named)
    )


def _fields_line(
    records: Sequence[Mapping[str, object]], missing: Sequence[str], given: Mapping[str, str], labels: Sequence[str]
) -> str:
    """Name the fields that the records have, and the flags that say which of them are the missing ones.

    labels: if the answer is one of a few; of other answers than these their flag is named as well.
    """
    names = list(dict.fromkeys(str(name) for record in records for name in record))
    plain = [name if PLAIN.fullmatch(name) else quote(name) for name in names[:SHOWN_FIELDS]]
    shown = f"Fields here: {', '.join(plain) or 'none'}{', ...' * (len(names) > SHOWN_FIELDS)}"
    guessed = {role: next((name for name in names if label_key(name.strip()) in WORDS[role]), None) for role in missing}
    if guessed.get("context", "known") is None:
        guessed["context"] = _only_text(records, {*given.values(), *guessed.values()})
    if not guessed.get("question", "known"):
        return f"{shown}. Name those of question, context and answer: {FLAGS}."
    typed = {role: name or NO_CONTEXT for role, name in guessed.items() if name or role == "context"}
    flags = " ".join(f"--{role}_field {shlex.quote(name)}" for role, name in typed.items())
    rest = f"; {NO_ANSWER}" * ("label" in missing and "label" not in typed)
    if flags and labels and not rest:
        answers, flag = _flag_for_answers(records, {**given, **typed})
        if not {*map(label_key, answers)} <= {*map(label_key, labels), "maybe"}:
            flags = f"{flags} {flag}".rstrip()
    return f"{shown}{f'; try {flags}' if flags else ''}{rest}"


def _only_text(records: Sequence[Mapping[str, object]], taken: Collection[str | None]) -> str | None:
    """Return the field whose values are mostly texts of several words, if no role has it and there is only one.

    A field that gives reasons for the right answer is none.
    """
    names = dict.fromkeys(str(name) for record in records for name in record)
    free = [name for name in names if name not in taken and label_key(name) not in REASONS]
    texts = {name: [it for record in records if isinstance(it := record.get(name), str)] for name in free}
    long = [name for name in free if sum(len(it.split()) >= CONTEXT_WORDS for it in texts[name]) > len(records) / 2]
    return long[0] if len(long) == 1 else None


def forgotten_context(records: Sequence[object], given: Mapping[str, str]) -> str:
    """Return a warning if no record has a context, though one of their fields looks like it; "" otherwise.

    given: the fields that flags set.
    """
    plain = [record for record in records if isinstance(record, dict)]
    named = [names_of(record, given) for record in plain]
    if "context" in given or any(names.context in record for record, names in zip(plain, named, strict=True)):
        return ""
    fields = dict.fromkeys(str(name) for record in plain for name in record)
    if any(map(has_options, plain)) or not fields:
        return ""
    taken = {it for names in named for it in (names.question, names.label, names.id)}
    taken |= {name for name in fields if label_key(name.strip()) in WORDS["label"]}
    by_name = (name for name in fields if name not in taken and label_key(name.strip()) in WORDS["context"])
    if not (found := next(by_name, None) or _only_text(plain, taken)):
        return ""
    return (
        f"Warning: no prompt has a context, but {quote(found)} looks like one: --context_field {shlex.quote(found)}, "
        f"or --context_field {NO_CONTEXT} if it is none."
    )


def _answers_found(records: Sequence[Mapping[str, object]], given: Mapping[str, str]) -> str:
    """Name the answers that are there, and the flag that accepts them; "" if the records differ too much."""
    if not any(names_of(record, given).label in record for record in records):
        return f"No record has an answer: {NO_ANSWER}."
    found, flag = _flag_for_answers(records, given)
    shown = ", ".join(f"{count} {quote(answer)}" for answer, count in found.most_common(SHOWN_ANSWERS))
    shown += ", ..." * (len(found) > SHOWN_ANSWERS)
    return f"Answers found: {shown}; try {flag}" if flag else ""


def _flag_for_answers(records: Sequence[Mapping[str, object]], given: Mapping[str, str]) -> tuple[Counter[str], str]:
    """Return the answers that are there and the flag that accepts them; "" if the records differ too much."""
    named = [(record, names_of(record, given).label) for record in records]
    found: Counter[str] = Counter()
    letters: set[str] = set()
    for record, name in named:
        with suppress(Unusable):
            options = options_of(record, ()) if has_options(record) else {}
            letters.update(options)
            found[right_letter(record.get(name), options) if options else final_answer(record.get(name))] += 1
    if found.total() < len(records) or len(found) < 2:
        return found, ""
    labels = sorted({*found, *letters})
    short = all(len(label) <= LONGEST_LABEL and "," not in label for label in labels)
    if len(labels) <= MOST_LABELS and short and len({*map(label_key, labels)}) == len(labels):
        return found, f"--labels {shlex.quote(','.join(labels))}"
    kind = "number" if all(number_of(answer) is not None for answer in found) else "text"
    return found, f"--answers {kind}"


def _units(records: Sequence[Mapping[str, object]], given: Mapping[str, str]) -> list[str]:
    """Return the units that stand beside the records' numbers; none if another answer is not a number, either."""
    units: dict[str, None] = {}
    for record in records:
        with suppress(Unusable):
            text = final_answer(record.get(names_of(record, given, answers="number").label))
            unit = text.strip(AROUND_UNITS)
            if number_of(text) is None and unit not in units:
                if not UNIT.fullmatch(unit) or "," in unit or number_of(text, [unit]) is None:
                    return []
                units[unit] = None
    return list(units) if len(units) <= MOST_UNITS else []
