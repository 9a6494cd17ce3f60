"""Scoring: call the reward functions on completions, check the returned values, and sum them by weight.

A user's function may raise, hang or return unusable values. The error names the function, the record and the line of
its file; it either ends the run or counts as "does not apply" for all completions of the call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Literal

from grpo_ds.errors import RewardError
from grpo_ds.task.questions import Question
from grpo_ds.task.reward_calls import LONGEST_QUOTE, Columns, Faulty, call_all
from grpo_ds.task.rewards import ACCEPTED, ARGUMENTS, OwnReward, Prompt, RewardFunction, WeightedFunctions

OnRewardError = Literal["stop", "zero"]
REMEDY = "Fix it, or continue without its rewards if it fails: --on_reward_error zero."
LARGEST_REWARD = 1e15  # float32 must hold the squares of rewards, which a group's standard deviation sums
# form of the completions -> words of an error that show that the function expects the other form
WRONG_FORM = {
    "text": ("string indices must be integers", "'str' object has no attribute 'get'"),
    "messages": ("'list' object has no attribute", "got 'list'", "list indices must be integers"),
}


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of B completions, weights applied: total[i] is the sum of by_name[...][i], with None as 0.

    Example: two completions; the second function does not apply to the second one.
        >>> functions = {"short": (lambda **_: [1.0, 0.0], 1.0), "cites": (lambda **_: [1.0, None], 0.5)}
        >>> score(["a", "bb"], [Question("1", "Is it?", "", "yes")] * 2, functions=functions)
        Rewards(total=[1.5, 0.0], by_name={'short': [1.0, 0.0], 'cites': [0.5, None]}, errors={}, extra={}, metrics={})
    """

    total: list[float]  # [B]
    by_name: Mapping[str, Sequence[float | None]]  # [B] each; None if the function does not apply
    errors: dict[str, str] = field(default_factory=dict)  # function -> its error; its rewards are then all None

    extra: dict[str, list[Any]] = field(default_factory=dict)  # [B] each: columns that functions log (log_extra)
    metrics: dict[str, list[float]] = field(default_factory=dict)  # values that functions log (log_metric)

    def plus(self, name: str, values: Sequence[float]) -> "Rewards":
        """Add another reward, [B], that is not computed from the text."""
        total = [reward + value for reward, value in zip(self.total, values, strict=True)]
        return replace(self, total=total, by_name={**self.by_name, name: list(values)})

    def replaced(self, name: str, values: Sequence[float | None]) -> "Rewards":
        """Put other values, [B], in the place of a reward."""
        by_name = {**self.by_name, name: list(values)}
        return replace(self, total=summed(by_name).total, by_name=by_name)

    def rows(self, order: Sequence[int]) -> "Rewards":
        """Return the rewards of these completions, in this order."""
        by_name = {name: [values[i] for i in order] for name, values in self.by_name.items()}
        extra = {name: [values[i] for i in order] for name, values in self.extra.items()}
        return replace(self, total=[self.total[i] for i in order], by_name=by_name, extra=extra)


def summed(by_name: Mapping[str, Sequence[float | None]]) -> Rewards:
    """Return the rewards of one or more functions with their sum, in which None counts as 0."""
    return Rewards([sum(value or 0.0 for value in row) for row in zip(*by_name.values(), strict=True)], by_name)


def joined(parts: Sequence[Rewards]) -> Rewards:
    """Concatenate rewards of several calls of the same functions."""
    names, columns = parts[0].by_name, dict.fromkeys(name for part in parts for name in part.extra)
    metrics = dict.fromkeys(name for part in parts for name in part.metrics)
    return Rewards(
        [reward for part in parts for reward in part.total],
        {name: [reward for part in parts for reward in part.by_name[name]] for name in names},
        {name: error for part in reversed(parts) for name, error in part.errors.items()},
        {name: [v for part in parts for v in part.extra.get(name, [None] * len(part.total))] for name in columns},
        {name: [v for part in parts for v in part.metrics.get(name, [])] for name in metrics},
    )


@dataclass(frozen=True, slots=True)
class Sampled:
    """Values that a reward function may ask for beside the texts and the records.

    Example:
        Sampled([Prompt("<|im_start|>user\\n...", [{"role": "user", "content": "..."}])], [[1320, 151645]], state)
    """

    prompts: Sequence[Prompt]  # [B]
    completion_ids: Sequence[Sequence[int]]  # [B], each up to its EOS
    trainer_state: object  # transformers.TrainerState


def score(
    completions: Sequence[str],
    questions: Sequence[Question],
    *,
    functions: WeightedFunctions,
    sampled: Sampled | None = None,
    timeout: float = 0.0,
    on_error: OnRewardError = "stop",
) -> Rewards:
    """Compute the rewards of B completions; `questions` has length B: a group's question is repeated G times.

    sampled: None: functions get neither prompts nor ids.
    timeout: seconds for a call, 0 for no limit (reward_calls.py lists what it can stop).
    on_error: "stop" raises RewardError, "zero" sets all rewards of the function to None for this call.
    """
    columns, state = columns_of(completions, questions, sampled), sampled and sampled.trainer_state
    called = call_all({name: f for name, (f, _) in functions.items()}, columns, trainer_state=state, timeout=timeout)
    by_name: dict[str, list[float | None]] = {}
    errors: dict[str, str] = {}
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}
    for name, (function, weight) in functions.items():
        outcome, notes = called[name]
        try:
            if isinstance(outcome, Faulty):
                raise outcome
            by_name[name] = _weighted(outcome, weight)
            extra |= notes.extra
            for metric, values in notes.metrics.items():
                metrics.setdefault(metric, []).extend(values)
        except Faulty as fault:
            errors[name] = f"The reward function '{name}' {fault}"
            if on_error != "zero":
                indices = fault.indices or _find_faulty(function, columns, state, timeout)
                raise RewardError(f"{errors[name]}\n{_place(indices, columns)}\n{_remedy(function, fault)}") from None
            by_name[name] = [None] * len(completions)
    return Rewards(summed(by_name).total, by_name, errors, extra, metrics)


def right_answers(question: Question) -> tuple[str, ...]:
    """Return the answers that are right; () if none is known."""
    return question.accepted or ((question.label,) if question.label else ())


def columns_for_rewards(questions: Sequence[Question]) -> list[str]:
    """Return the names of the columns that a reward function may ask for, beside those of every question."""
    accepted = [ACCEPTED] if any(question.accepted for question in questions) else []
    return [*questions[0].columns, *accepted]


def columns_of(completions: Sequence[str], questions: Sequence[Question], sampled: Sampled | None = None) -> Columns:
    """Build the arguments that have an entry for each completion; ours replace a record's fields of the same name."""
    names = [name for name in questions[0].columns if name not in ARGUMENTS] if questions else []
    texts = any(question.accepted for question in questions)
    accepted = {ACCEPTED: [right_answers(question) for question in questions]} if texts else {}
    return {
        **{name: [question.columns.get(name) for question in questions] for name in names},
        "id": [question.id for question in questions],
        "question": [question.text for question in questions],
        "context": [question.context for question in questions],
        "label": [question.label for question in questions],
        **accepted,
        "completions": completions,
        **({"prompts": sampled.prompts, "completion_ids": sampled.completion_ids} if sampled else {}),
    }


def _weighted(values: Sequence[float | None], weight: float) -> list[float | None]:
    rewards = [None if value is None else weight * value for value in values]
    for index, reward in enumerate(rewards):
        if reward is not None and not abs(reward) <= LARGEST_REWARD:
            raise Faulty(
                f"returned {values[index]} ({reward:g} after its weight); the limit is {LARGEST_REWARD:g}.", [index]
            )
    return rewards


def _find_faulty(function: RewardFunction, columns: Columns, trainer_state: object, timeout: float) -> Sequence[int]:
    """Find the first completion that also fails alone; return () if each of the others fails, too.

    Return all if no call with one fails within the time.
    """
    indices, end = range(len(columns["completions"])), monotonic() + timeout

    def fails(i: int) -> bool:
        left = end - monotonic() if timeout else 0.0
        if timeout and left <= 0:
            return False
        alone = {name: column[i : i + 1] for name, column in columns.items()}
        outcome, _ = call_all({"": function}, alone, trainer_state=trainer_state, timeout=left)[""]
        return isinstance(outcome, Faulty) and not (timeout and monotonic() >= end)

    found = next((i for i in indices if fails(i)), None)
    if found is None:
        return indices
    of_several = len({*columns["id"]}) > 1
    return () if found == 0 and of_several and all(map(fails, indices[1:])) else (found,)


def _remedy(function: RewardFunction, fault: Faulty) -> str:
    if not isinstance(function, OwnReward):
        return REMEDY
    form, other = ("messages", "text") if function.messages else ("text", "messages")
    if any(words in str(fault) for words in WRONG_FORM[form]):
        return f"It gets completions as {form}; if it expects the other form: --completion_format {other}.\n{REMEDY}"
    return REMEDY


def _place(indices: Sequence[int], columns: Columns) -> str:
    if not indices:
        return f"It fails for any completion, also for this one alone: {columns['completions'][0][:LONGEST_QUOTE]!r}"
    ids = list(dict.fromkeys(columns["id"][i] for i in indices))
    if len(indices) == 1:
        return f"Record {ids[0]}, completion {columns['completions'][indices[0]][:LONGEST_QUOTE]!r}"
    return f"It was scoring completions for record{'s' * (len(ids) > 1)} {', '.join(ids)}."[:250]
