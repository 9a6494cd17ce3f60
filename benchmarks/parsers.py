"""Accuracy that each parser of answers reports for answerers that know nothing, or everything; needs no model.

Every question of --data is answered in nine trivial ways, and graded by the strict parser and by the lax ones
(grpo_ds/task/lax.py). docs/the_recipe.md discusses the table.

    python benchmarks/parsers.py [--data sample] [--labels yes,no]
"""

import argparse
from collections.abc import Callable, Sequence

from grpo_ds.report.markdown import table
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import graded
from grpo_ds.task.lax import PARSERS, lax_grades
from grpo_ds.task.prompts import build_messages
from grpo_ds.task.questions import Question, read_questions
from grpo_ds.task.worked_examples import BIOMEDICAL

Answerer = Callable[[Question, str, AnswerFormat], str]
PLAIN = "It is in the abstract."  # holds the letters of neither yes nor no


def wrong(question: Question, form: AnswerFormat) -> str:
    return next(label for label in form.labels if label != question.label)


ANSWERERS: dict[str, Answerer] = {
    "the right label, in form": lambda q, _, form: form.write(PLAIN, q.label),
    "the right label, in form, both labels weighed": lambda q, _, form: form.write(" or ".join(form.labels), q.label),
    "the wrong label, in form": lambda q, _, form: form.write(PLAIN, wrong(q, form)),
    "the first label, in form, to everything": lambda q, _, form: form.write(PLAIN, form.labels[0]),
    "the second label, in form, to everything": lambda q, _, form: form.write(PLAIN, form.labels[1]),
    "the first label as a word, to everything": lambda q, _, form: f"{form.labels[0].capitalize()}.",
    "its prompt, repeated": lambda q, prompt, _: prompt,
    '"I do not know."': lambda q, _, form: "I do not know.",
    "nothing": lambda q, _, form: "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample", help="file with answers, or sample")
    parser.add_argument("--labels", default="yes,no")
    arguments = parser.parse_args()
    form = AnswerFormat(tuple(arguments.labels.split(",")))
    found = read_questions(arguments.data, labels=form.labels)
    print(found.source)
    print(table(["answer", "strict", *PARSERS], rows(found.questions, form)))


def rows(questions: Sequence[Question], form: AnswerFormat) -> list[list[str]]:
    """Return a row for each answerer: its name, and its accuracy under each parser."""
    prompts = [prompt_text(question, form) for question in questions]
    made = []
    for name, answer in ANSWERERS.items():
        texts = [answer(question, prompt, form) for question, prompt in zip(questions, prompts, strict=True)]
        lax = lax_grades(texts, prompts, questions, form)
        every = [graded(texts, questions, form).grades, *lax.values()]
        made.append([name, *(f"{grades.accuracy:.1%}" for grades in every if grades)])
    return made


def prompt_text(question: Question, form: AnswerFormat) -> str:
    """Return the chat's texts, without a model's template."""
    return "\n".join(str(turn["content"]) for turn in build_messages(question, answer_format=form, subject=BIOMEDICAL))


if __name__ == "__main__":
    main()
