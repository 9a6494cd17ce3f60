"""Rewards: functions from completions to numbers, summed by weight, each reported by itself.

A reward function takes keyword arguments, as in TRL (`completions`, `questions`), and returns one number a
completion. The built-in ones and a user's own meet in one mapping of name -> (function, weight).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from numbers import Real

from grpo_ds.errors import UsageError
from grpo_ds.task.answers import parse_answer
from grpo_ds.task.questions import Question

RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of B completions, weights applied: total[i] is the sum of by_name[...][i]."""

    total: list[float]  # [B]
    by_name: dict[str, list[float]]  # [B] each

    def plus(self, name: str, values: Sequence[float]) -> "Rewards":
        """These and one more, [B], that no text decides."""
        total = [reward + value for reward, value in zip(self.total, values, strict=True)]
        return Rewards(total, {**self.by_name, name: list(values)})


def correctness(completions: Sequence[str], questions: Sequence[Question], *, labels: Sequence[str]) -> list[float]:
    """1 where a completion keeps to the answer contract and its answer is right."""
    pairs = zip(completions, questions, strict=True)
    return [float(parse_answer(completion, labels=labels).answer == question.label) for completion, question in pairs]


def tag_pairs(completions: Sequence[str], questions: Sequence[Question], *, labels: Sequence[str]) -> list[float]:
    """How many of the two tag pairs stand well-formed: 0, 1 or 2, right answer or not."""
    parsed = [parse_answer(completion, labels=labels) for completion in completions]
    return [float(answer.reasoning_tags + answer.answer_tags) for answer in parsed]


def reward_functions(
    *, labels: Sequence[str], correctness_reward: float = 2.0, format_reward: float = 0.2
) -> dict[str, tuple[RewardFunction, float]]:
    """The built-in rewards, name -> (function, weight)."""
    return {
        "correctness": (partial(correctness, labels=labels), correctness_reward),
        "format": (partial(tag_pairs, labels=labels), format_reward),
    }


def score(
    completions: Sequence[str],
    questions: Sequence[Question],
    *,
    functions: Mapping[str, tuple[RewardFunction, float]],
) -> Rewards:
    """Reward each completion for its question; both have length B, a group's question repeated G times."""
    by_name = {
        name: [weight * float(value) for value in _values(name, function, completions, questions)]
        for name, (function, weight) in functions.items()
    }
    return Rewards([sum(column[i] for column in by_name.values()) for i in range(len(completions))], by_name)


def _values(
    name: str, function: RewardFunction, completions: Sequence[str], questions: Sequence[Question]
) -> list[float]:
    """What a reward function returned, if it is one finite number a completion."""
    values = list(function(completions=completions, questions=questions))
    if len(values) != len(completions):
        raise UsageError(
            f"The reward function '{name}' returned {len(values)} values for {len(completions)} completions.\n"
            "It must return one number for each completion, in the same order."
        )
    for row, value in enumerate(values):
        if not isinstance(value, Real) or not isfinite(value):
            raise UsageError(
                f"The reward function '{name}' returned {value!r} for completion {row}: {completions[row][:60]!r}\n"
                "It must return a finite number; return 0.0 for a completion that it cannot judge."
            )
    return values
