"""Greedy answers to the held-out questions, graded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_ds.system.ranks import World
from grpo_ds.task.grading import Grades, grade
from grpo_ds.task.questions import Question
from grpo_ds.training.rollout import PromptStyle
from grpo_ds.training.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers in the order of the questions, and their grades."""

    texts: list[str]
    answers: list[str | None]
    grades: Grades


def evaluate(
    sampler: Sampler,
    style: PromptStyle,
    questions: Sequence[Question],
    world: World,
    *,
    advance: Callable[[int], None] = lambda answered: None,
    together: Callable[[Callable[[], list[str]]], list[str]] = lambda run: run(),
) -> Evaluation:
    """Every rank answers its share; every rank returns the whole. `advance` hears of answers as they come.

    together: how a rank's own work is run, that ranks may stop in it (Trainer.together).
    """

    def answer() -> list[str]:
        mine = questions[world.rank :: world.size]
        if not mine:
            return []
        prompts = style.encode(sampler.tokenizer, mine)
        heard = lambda answered: advance(answered * world.size)  # noqa: E731
        return style.texts(sampler.tokenizer, sampler(prompts, group_size=1, temperature=0.0, advance=heard))

    shares = world.gather(together(answer))
    whole = [shares[i % world.size][i // world.size] for i in range(len(questions))]
    return graded(whole, questions, style)


def graded(texts: list[str], questions: Sequence[Question], style: PromptStyle) -> Evaluation:
    """An answer a question, and what they are worth."""
    answers = [style.answer_format.parse(text).answer for text in texts]
    return Evaluation(texts, answers, grade(answers, questions, labels=style.answer_format.labels))
