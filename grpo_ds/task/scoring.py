"""Scoring: call the reward functions on completions, check the returned values, and sum them by weight.

A user's function may raise, hang or return unusable values. The error names the function, the record and the line of
its file; it either ends the run or counts as "does not apply" for all completions of the call.
"""

import signal
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from grpo_ds.errors import RewardError
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import RewardFunction, WeightedFunctions

OnRewardError = Literal["stop", "zero"]
Columns = Mapping[str, Sequence[Any]]  # arguments of a reward function: name -> list of length B
REMEDY = "Fix it, or continue without its rewards if it fails: --on_reward_error zero."
LONGEST_QUOTE = 80  # characters of a completion, a value or a line of code that an error repeats
LARGEST_REWARD = 1e15  # float32 must hold the squares of rewards, which a group's standard deviation sums
LONGEST_REASON = 160  # characters of an exception's message


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of B completions, weights applied: total[i] is the sum of by_name[...][i], with None as 0.

    Example: two completions; the second function does not apply to the second one.
        >>> functions = {"short": (lambda **_: [1.0, 0.0], 1.0), "cites": (lambda **_: [1.0, None], 0.5)}
        >>> score(["a", "bb"], [Question("1", "Is it?", "", "yes")] * 2, functions=functions)
        Rewards(total=[1.5, 0.0], by_name={'short': [1.0, 0.0], 'cites': [0.5, None]}, errors={})
    """

    total: list[float]  # [B]
    by_name: Mapping[str, Sequence[float | None]]  # [B] each; None if the function does not apply
    errors: dict[str, str] = field(default_factory=dict)  # function -> its error; its rewards are then all None

    def plus(self, name: str, values: Sequence[float]) -> "Rewards":
        """Add another reward, [B], that is not computed from the text."""
        total = [reward + value for reward, value in zip(self.total, values, strict=True)]
        return Rewards(total, {**self.by_name, name: list(values)}, self.errors)


def joined(parts: Sequence[Rewards]) -> Rewards:
    """Concatenate rewards of several calls of the same functions."""
    names = parts[0].by_name
    return Rewards(
        [reward for part in parts for reward in part.total],
        {name: [reward for part in parts for reward in part.by_name[name]] for name in names},
        {name: error for part in reversed(parts) for name, error in part.errors.items()},
    )


class _Faulty(Exception):
    """A call that failed: what the function did, and at which completions (none: not known)."""

    def __init__(self, what: str, indices: Sequence[int] = ()) -> None:
        super().__init__(what)
        self.indices = indices


class _TimedOut(BaseException):
    """Time limit reached. It is no Exception, so that a function's `except Exception` does not catch it."""


def score(
    completions: Sequence[str],
    questions: Sequence[Question],
    *,
    functions: WeightedFunctions,
    timeout: float = 0.0,
    on_error: OnRewardError = "stop",
) -> Rewards:
    """Compute the rewards of B completions; `questions` has length B: a group's question is repeated G times.

    timeout: seconds for a call, 0 for no limit; `_time_limit` lists what it can stop.
    on_error: "stop" raises RewardError, "zero" sets all rewards of the function to None for this call.
    """
    columns = columns_of(completions, questions)
    by_name: dict[str, list[float | None]] = {}
    errors: dict[str, str] = {}
    for name, (function, weight) in functions.items():
        try:
            values = _weighted(_call(function, columns, timeout), weight)
        except _Faulty as fault:
            errors[name] = f"The reward function '{name}' {fault}"
            if on_error != "zero":
                indices = fault.indices or _find_faulty(function, columns, timeout)
                raise RewardError(f"{errors[name]}\n{_place(indices, columns)}\n{REMEDY}") from None
            values = [None] * len(completions)
        by_name[name] = values
    total = [sum(column[i] or 0.0 for column in by_name.values()) for i in range(len(completions))]
    return Rewards(total, by_name, errors)


def columns_of(completions: Sequence[str], questions: Sequence[Question]) -> Columns:
    """Build the arguments of the reward functions; our own five columns replace a record's fields of the same name."""
    names = questions[0].columns if questions else ()
    return {
        **{name: [question.columns.get(name) for question in questions] for name in names},
        "id": [question.id for question in questions],
        "question": [question.text for question in questions],
        "context": [question.context for question in questions],
        "label": [question.label for question in questions],
        "completions": completions,
    }


def describe_exception(error: BaseException, file: str | None = None) -> str:
    """Describe an exception on one line, with the last line of `file` in its traceback.

    file: None for the file of the function that was called.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON].removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{reason} ({Path(error.filename).name}, line {error.lineno})" if error.filename else reason
    frames = traceback.extract_tb(error.__traceback__)
    file = file or (frames[1].filename if len(frames) > 1 else None)  # frames[0] is ours
    within = [frame for frame in frames if frame.filename == file]
    if not within:
        return reason
    last = within[-1]
    return f"{reason} ({Path(last.filename).name}, line {last.lineno}: {(last.line or '')[:LONGEST_QUOTE]})"


def _weighted(values: Sequence[float | None], weight: float) -> list[float | None]:
    rewards = [None if value is None else weight * float(value) for value in values]
    for index, reward in enumerate(rewards):
        if reward is not None and not abs(reward) <= LARGEST_REWARD:
            value = _shown(values[index])
            raise _Faulty(f"returned {value} ({reward:g} after its weight); the limit is {LARGEST_REWARD:g}.", [index])
    return rewards


def _call(function: RewardFunction, columns: Columns, timeout: float) -> list[float | None]:
    """Call the function; return one finite number or None for each completion. Raises _Faulty."""
    try:
        with _time_limit(timeout):
            values = _returned(function, columns)
    except _TimedOut:
        everything = range(len(columns["completions"]))
        raise _Faulty(f"took longer than the {timeout:g} seconds of --reward_timeout.", everything) from None
    count = len(columns["completions"])
    if len(values) != count:
        number = f"more than {count}" if len(values) > count else len(values)
        raise _Faulty(f"returned {number} values for {count} completions, not one for each.")
    for index, value in enumerate(values):
        if value is not None and not _is_finite(value):
            raise _Faulty(f"returned {_shown(value)}; it must return finite numbers, or None.", [index])
    return values


def _returned(function: RewardFunction, columns: Columns) -> list[Any]:
    try:
        returned = function(**{name: list(column) for name, column in columns.items()})  # copies: it may change them
        # A set has no order, a mapping would give its keys, and bytes would pass as numbers.
        if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | bytearray | Mapping | Set):
            return list(islice(returned, len(columns["completions"]) + 1))  # a generator may be endless
    except (Exception, SystemExit) as error:  # a user's function may raise anything; the message repeats it
        raise _Faulty(f"raised {describe_exception(error)}") from None
    raise _Faulty(f"returned {_shown(returned)}, not a list of one number for each completion.")


def _shown(value: object) -> str:
    """Show a value in an error. An integer of 5,000 digits has no repr, and a user's class may have none."""
    try:
        return " ".join(repr(value).split())[:LONGEST_QUOTE]
    except Exception:  # a user's class may raise anything
        return f"a {type(value).__name__}"


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and isfinite(value)
    except (
        ArithmeticError,
        TypeError,
        ValueError,
    ):  # an int too large for a float, a class that only claims to be a number
        return False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimedOut in the body after `seconds`, or never at 0.

    It uses SIGALRM, so it works only in the main thread. It stops Python code, regular expressions, sleeping and
    waiting for a network. Other C code is interrupted when it returns to Python. A bare `except:` can catch the alarm,
    and a function that sets an alarm itself replaces ours. A worker thread is no alternative: it cannot be stopped, and
    verifiers that use signal.alarm do not run in one.
    """
    if not seconds:
        yield
        return

    def time_out(*_: object) -> None:
        raise _TimedOut

    handler = signal.signal(signal.SIGALRM, time_out)
    previous_alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *previous_alarm)


def _find_faulty(function: RewardFunction, columns: Columns, timeout: float) -> Sequence[int]:
    """Find the first completion that also fails alone; return all if no call with one fails within the time."""
    indices = range(len(columns["completions"]))
    try:
        with _time_limit(timeout):
            for i in indices:
                try:
                    _call(function, {name: column[i : i + 1] for name, column in columns.items()}, timeout=0.0)
                except _Faulty:
                    return [i]
    except _TimedOut:
        pass
    return indices


def _place(indices: Sequence[int], columns: Columns) -> str:
    ids = list(dict.fromkeys(columns["id"][i] for i in indices))
    if len(indices) == 1:
        return f"Record {ids[0]}, completion {columns['completions'][indices[0]][:LONGEST_QUOTE]!r}"
    return f"It was scoring completions for record{'s' * (len(ids) > 1)} {', '.join(ids)}."[:250]
