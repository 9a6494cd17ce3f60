"""Greedy answers to the held-out questions, graded."""

from collections.abc import Callable, Sequence

from grpo_ds.system.ranks import World
from grpo_ds.task.grading import Evaluation, graded
from grpo_ds.task.questions import Question
from grpo_ds.training.rollout import PromptStyle
from grpo_ds.training.sampling import Sampler


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
    return graded(whole, questions, style.answer_format)
