"""Lax parsers: how scripts that do not insist on a form read an answer, to compare figures with theirs.

`grpo-ds eval --grading lax` reports them beside the strict parser (answers.py). No reward and no training reads them:
each finds an answer in texts that give none (docs/the_recipe.md shows how far that moves an accuracy).
"""

import re
from collections.abc import Sequence

from grpo_ds.task.grading import Grades, grade
from grpo_ds.task.questions import Question
from grpo_ds.task.spelling import label_key, nfc

PARSERS = {  # name -> what it takes for the answer
    "last_label": "the last label that stands as a word, in any case",
    "any_label": "the first label, in the order of --labels, whose letters are anywhere in the text",
    "any_label_with_prompt": "the same, with the prompt in front of the text",
}


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


def lax_grades(
    texts: Sequence[str], prompts: Sequence[str], questions: Sequence[Question], *, labels: Sequence[str]
) -> dict[str, Grades]:
    """Grade texts[i], the completion of prompts[i], under each of PARSERS; `well_formed` is the share with an answer.

    The script of docs/the_recipe.md evaluates by `any_label_with_prompt`: it decodes prompt and completion together.
    """
    both = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    read = {
        "last_label": [last_label(text, labels) for text in texts],
        "any_label": [any_label(text, labels) for text in texts],
        "any_label_with_prompt": [any_label(text, labels) for text in both],
    }
    return {name: grade(answers, questions, labels=labels) for name, answers in read.items()}
