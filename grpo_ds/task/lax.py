"""Lax parsers: how scripts that do not insist on a form read an answer, to compare figures with theirs.

`grpo-ds eval --grading lax` reports them beside the strict parser (answers.py). No reward and no training reads them:
each finds an answer in texts that give none (docs/the_recipe.md shows how far that moves an accuracy).
"""

import re
from collections.abc import Sequence

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import Grades, grade_answers
from grpo_ds.task.numbers import number_of, number_text
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import right_answers
from grpo_ds.task.spelling import label_key, nfc, text_key

PARSERS = {  # of labels: name -> what it takes for the answer
    "last_label": "the last label that stands as a word, in any case",
    "any_label": "the first label, in the order of --labels, whose letters are anywhere in the text",
    "any_label_with_prompt": "the same, with the prompt in front of the text",
}
OTHER_PARSERS = {  # of numbers and of texts
    "last_number": "the last number in the text",
    "accepted_anywhere": "an accepted answer, if its words are anywhere in the text",
}
LONE_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?")


def last_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the last label that stands as a word of its own, in any case; None without one.

    lm-eval's `flexible-extract` reads numbers in this way, and some scripts the words yes and no. A completion stops at
    </answer>, so a label between the tags is the last one.
    """
    # A label of one letter keeps its case: "a" is a word of most sentences, A a choice.
    fold = nfc if min(map(len, labels)) == 1 else label_key
    spelled = {fold(label): label for label in labels}
    words = "|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))  # "no effect" before "no"
    found = re.findall(rf"(?<!\w)(?:{words})(?!\w)", fold(text))
    return spelled[found[-1]] if found else None


def any_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the first of the labels, in their own order, whose letters occur in the text; None without one.

    Words count in part: "know" and "another" hold a "no". The public script of docs/the_recipe.md reads its rewards so.
    """
    composed = nfc(text)
    return next((label for label in labels if nfc(label) in composed), None)


def last_number(text: str) -> str | None:
    """Return the last number in digits, in its canonical spelling; None without one.

    lm-eval's `flexible-extract` reads GSM8K so; units and markup around a number do not matter.
    """
    numbers = (number_of(found) for found in reversed(LONE_NUMBER.findall(text)))
    return next((number_text(number) for number in numbers if number is not None), None)


def accepted_anywhere(text: str, accepted: Sequence[str]) -> str | None:
    """Return the first accepted answer whose words are in the text, in their order; None without one."""
    words = f" {text_key(text)} "
    return next((answer for answer in accepted if text_key(answer) and f" {text_key(answer)} " in words), None)


def lax_grades(
    texts: Sequence[str], prompts: Sequence[str], questions: Sequence[Question], answer_format: AnswerFormat
) -> dict[str, Grades]:
    """Grade texts[i], the completion of prompts[i], under each parser of this kind of answer.

    `well_formed` is the share with an answer. The script of docs/the_recipe.md evaluates by `any_label_with_prompt`: it
    decodes prompt and completion together.
    """
    labels, both = answer_format.labels, [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    read: dict[str, list[str | None]] = {}
    if answer_format.is_closed:
        read["last_label"] = [last_label(text, labels) for text in texts]
        read["any_label"] = [any_label(text, labels) for text in texts]
        read["any_label_with_prompt"] = [any_label(text, labels) for text in both]
    if answer_format.kind == "number":
        read["last_number"] = [last_number(text) for text in texts]
    if answer_format.kind == "text":
        pairs = zip(texts, questions, strict=True)
        read["accepted_anywhere"] = [accepted_anywhere(text, right_answers(question)) for text, question in pairs]
    graded = {name: grade_answers(answers, questions, answer_format) for name, answers in read.items()}
    return {name: grades for name, grades in graded.items() if grades}
