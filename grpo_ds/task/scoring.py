"""Scoring: reward functions called on completions, what they return checked, summed by weight.

A function of the user's own may raise, hang or return nonsense. That is told with its name, the record and the
line of its file, and then either ends the run or counts as "does not apply" for the whole batch.
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
Batch = Mapping[str, Sequence[Any]]  # what a reward function is called with: name -> list of length B
REMEDY = "Mend it, or go on without its rewards where it fails: --on_reward_error zero."
CLIP = 80  # characters of a completion or of a line of code that an error repeats
LARGEST = 1e15  # of a reward: float32 holds the squares of a group's, which its deviation adds up
LONGEST_REASON = 160  # characters of an exception's own message


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of B completions, weights applied: total[i] is the sum of by_name[...][i], None counting as 0."""

    total: list[float]  # [B]
    by_name: Mapping[str, Sequence[float | None]]  # [B] each; None where the function does not apply
    errors: dict[str, str] = field(default_factory=dict)  # function -> what went wrong; its rewards are all None

    def plus(self, name: str, values: Sequence[float]) -> "Rewards":
        """These and one more, [B], that no text decides."""
        total = [reward + value for reward, value in zip(self.total, values, strict=True)]
        return Rewards(total, {**self.by_name, name: list(values)}, self.errors)


def joined(parts: Sequence[Rewards]) -> Rewards:
    """The rewards of one batch after the other, by the same functions."""
    names = parts[0].by_name
    return Rewards(
        [reward for part in parts for reward in part.total],
        {name: [reward for part in parts for reward in part.by_name[name]] for name in names},
        {name: error for part in reversed(parts) for name, error in part.errors.items()},
    )


class _Faulty(Exception):
    """A call came to nothing: what the function did, and in which rows (none: not known)."""

    def __init__(self, what: str, rows: Sequence[int] = ()) -> None:
        super().__init__(what)
        self.rows = rows


class _TimedOut(BaseException):
    """Not an Exception, so that a function's own `except Exception` lets it through."""


def score(
    completions: Sequence[str],
    questions: Sequence[Question],
    *,
    functions: WeightedFunctions,
    timeout: float = 0.0,
    on_error: OnRewardError = "stop",
) -> Rewards:
    """Reward each completion for its question; both have length B, a group's question repeated G times.

    timeout: seconds a call may take, 0 for any number; see `_time_limit` for what it can stop.
    on_error: "stop" raises RewardError, "zero" takes the function's rewards as None for this batch.
    """
    batch = columns_of(completions, questions)
    by_name: dict[str, list[float | None]] = {}
    errors: dict[str, str] = {}
    for name, (function, weight) in functions.items():
        try:
            values = _weighted(_call(function, batch, timeout), weight)
        except _Faulty as fault:
            errors[name] = f"The reward function '{name}' {fault}"
            if on_error == "stop":
                rows = fault.rows or _rows_at_fault(function, batch, timeout)
                raise RewardError(f"{errors[name]}\n{_place(rows, batch)}\n{REMEDY}") from None
            values = [None] * len(completions)
        by_name[name] = values
    total = [sum(column[i] or 0.0 for column in by_name.values()) for i in range(len(completions))]
    return Rewards(total, by_name, errors)


def columns_of(completions: Sequence[str], questions: Sequence[Question]) -> Batch:
    """What reward functions are called with; a record's field named as one of our own gives way to it."""
    names = questions[0].columns if questions else ()
    return {
        **{name: [question.columns.get(name) for question in questions] for name in names},
        "id": [question.id for question in questions],
        "question": [question.text for question in questions],
        "context": [question.context for question in questions],
        "label": [question.label for question in questions],
        "completions": completions,
    }


def in_a_line(error: BaseException, file: str | None = None) -> str:
    """The exception, and the last line it passed in `file`; None: in the file of the function that was called."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON].removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{reason} ({Path(error.filename).name}, line {error.lineno})" if error.filename else reason
    frames = traceback.extract_tb(error.__traceback__)
    file = file or (frames[1].filename if len(frames) > 1 else None)  # frames[0] is ours
    within = [frame for frame in frames if frame.filename == file]
    if not within:
        return reason
    return f"{reason} ({Path(within[-1].filename).name}, line {within[-1].lineno}: {(within[-1].line or '')[:CLIP]})"


def _weighted(values: Sequence[float | None], weight: float) -> list[float | None]:
    rewards = [None if value is None else weight * float(value) for value in values]
    for row, reward in enumerate(rewards):
        if reward is not None and not abs(reward) <= LARGEST:
            raise _Faulty(
                f"returned {_shown(values[row])}, with its weight {reward:g}; {LARGEST:g} is the most.", [row]
            )
    return rewards


def _call(function: RewardFunction, batch: Batch, timeout: float) -> list[float | None]:
    """What the function returned, if it is one finite number or None a completion."""
    try:
        with _time_limit(timeout):
            values = _returned(function, batch)
    except _TimedOut:
        everything = range(len(batch["completions"]))
        raise _Faulty(f"took longer than the {timeout:g} seconds of --reward_timeout.", everything) from None
    count = len(batch["completions"])
    if len(values) != count:
        told = f"more than {count}" if len(values) > count else len(values)
        raise _Faulty(f"returned {told} values for {count} completions, not one for each.")
    for row, value in enumerate(values):
        if value is not None and not _is_finite(value):
            raise _Faulty(f"returned {_shown(value)}; it must return finite numbers, or None.", [row])
    return values


def _returned(function: RewardFunction, batch: Batch) -> list[Any]:
    try:
        returned = function(**{name: list(column) for name, column in batch.items()})  # its own, to change as it likes
        # Of a set the order is lost, of a mapping the values would be, and bytes would pass for numbers.
        if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | bytearray | Mapping | Set):
            return list(islice(returned, len(batch["completions"]) + 1))  # a generator may have no end
    except (Exception, SystemExit) as error:  # whatever a user's function raises is theirs to read
        raise _Faulty(f"raised {in_a_line(error)}") from None
    raise _Faulty(f"returned {_shown(returned)}, not a list of one number for each completion.")


def _shown(value: object) -> str:
    """A value as an error repeats it; an integer of 5,000 digits has no repr, and a user's class may have none."""
    try:
        return " ".join(repr(value).split())[:CLIP]
    except Exception:  # whatever a user's class raises
        return f"a {type(value).__name__}"


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and isfinite(value)
    except (ArithmeticError, TypeError, ValueError):  # an int beyond all floats, a number that is none after all
        return False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimedOut in the body after `seconds`, or never at 0.

    By SIGALRM, so only in the main thread: it stops Python code, regular expressions, sleeping and waiting for a
    network. Other C code is interrupted when it comes back to Python; a bare `except:` can swallow the alarm, and a
    function that sets one itself replaces it. A worker thread could be left behind but not be stopped, and
    verifiers that use signal.alarm refuse to run in one.
    """
    if not seconds:
        yield
        return

    def ring(*_: object) -> None:
        raise _TimedOut

    handler = signal.signal(signal.SIGALRM, ring)
    others_alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *others_alarm)


def _rows_at_fault(function: RewardFunction, batch: Batch, timeout: float) -> Sequence[int]:
    """The first completion that fails by itself as well; all where none does, or none in time."""
    rows = range(len(batch["completions"]))
    try:
        with _time_limit(timeout):
            for row in rows:
                try:
                    _call(function, {name: column[row : row + 1] for name, column in batch.items()}, timeout=0.0)
                except _Faulty:
                    return [row]
    except _TimedOut:
        pass
    return rows


def _place(rows: Sequence[int], batch: Batch) -> str:
    ids = list(dict.fromkeys(batch["id"][row] for row in rows))
    if len(rows) == 1:
        return f"Record {ids[0]}, completion {batch['completions'][rows[0]][:CLIP]!r}"
    return f"It was judging completions for record{'s' * (len(ids) > 1)} {', '.join(ids)}."[:250]
