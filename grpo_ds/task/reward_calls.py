"""Calls of reward functions: the one place where users' functions run.

A call may raise, hang, return unusable values or return a coroutine. Coroutines of one batch are awaited together, as
in TRL. All of it happens in the fence (system/fence.py): what users' code, or an object that it returned, does to the
process is put back. B completions; an outcome is a list of numbers, or what was wrong.
"""

import asyncio
import contextlib
import os
import signal
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import isawaitable
from itertools import islice
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from grpo_ds.system.fence import by_ctrl_c, fenced
from grpo_ds.task.rewards import OwnReward, RewardFunction

Columns = Mapping[str, Sequence[Any]]  # arguments of a reward function: name -> list of length B
LONGEST_QUOTE = 80  # characters of a completion, a value or a line of code that an error repeats
LONGEST_REASON = 160  # characters of an exception's message
GRACE = 0.5  # seconds that a cancelled coroutine may take to end
MOMENT = 0.01  # seconds in which a second signal that has arrived is handled
# Folders and files of code that stands between us and a user's function in a traceback.
BETWEEN = (Path(__file__).parents[1], Path(asyncio.__file__).parent, Path(contextlib.__file__))


class Faulty(Exception):
    """A call that failed: what the function did, and at which completions (none: not known)."""

    def __init__(self, what: str, indices: Sequence[int] = ()) -> None:
        super().__init__(what)
        self.indices = indices


class _TimedOut(BaseException):
    """Time limit reached. It is no Exception, so that a function's `except Exception` does not catch it."""


@dataclass(frozen=True, slots=True)
class Notes:
    """Log of a function about a batch, through `log_extra` and `log_metric`."""

    count: int  # B
    extra: dict[str, list[Any]] = field(default_factory=dict)  # column of the completions' table -> [B]
    metrics: dict[str, list[float]] = field(default_factory=dict)  # metric -> values of this batch

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add a column to the table of completions; what JSON cannot hold is kept as text."""
        entries = list(islice(values, self.count + 1))
        if len(entries) != self.count:
            raise ValueError(f"log_extra({column!r}) needs {self.count} values, one for each completion")
        self.extra[str(column)] = [v if v is None or type(v) in (bool, int, float, str) else str(v) for v in entries]

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric; a step's metric is the mean over its values of all ranks."""
        if not isfinite(number := float(value)):
            raise ValueError(f"log_metric({name!r}) got {number}, not a finite number")
        self.metrics.setdefault(str(name), []).append(number)


Outcome = list[float | None] | Faulty  # [B]


def call_all(
    functions: Mapping[str, RewardFunction], columns: Columns, *, trainer_state: object = None, timeout: float = 0.0
) -> dict[str, tuple[Outcome, Notes]]:
    """Call every function on the batch; those that return a coroutine are awaited together at the end.

    timeout: seconds for a call, 0 for no limit; `_time_limit` lists what it can stop.
    """
    notes = {name: Notes(len(columns["completions"])) for name in functions}
    outcomes: dict[str, Outcome] = {}
    awaited: dict[str, Awaitable[Any]] = {}
    for name, function in functions.items():
        try:
            with _faults(timeout, notes[name].count):
                arguments = _arguments(function, columns, trainer_state, notes[name])
                returned = fenced(partial(_called, function, arguments, notes[name].count, timeout))
            if isinstance(returned, list):
                outcomes[name] = returned
            else:
                awaited[name] = returned
        except Faulty as fault:
            outcomes[name] = fault
    if awaited:
        outcomes |= _await_all(awaited, len(columns["completions"]), timeout)
    return {name: (outcomes[name], notes[name]) for name in functions}


def _called(
    function: RewardFunction, arguments: Mapping[str, Any], count: int, timeout: float
) -> list[float | None] | Awaitable[Any]:
    """Call the function; return the numbers that it returns, or its coroutine."""
    with _time_limit(timeout):
        returned: Any = function(**arguments)
        return returned if isawaitable(returned) else _numbers(returned, count)


def _arguments(function: RewardFunction, columns: Columns, trainer_state: object, notes: Notes) -> dict[str, Any]:
    """Build the arguments of one call in the function's form; all are copies, because it may change them."""
    as_messages = isinstance(function, OwnReward) and function.messages
    arguments: dict[str, Any] = {name: _copied(column) for name, column in columns.items()}
    if as_messages:
        arguments["completions"] = [[{"role": "assistant", "content": text}] for text in columns["completions"]]
    if "prompts" in columns:
        as_chat = [[dict(message) for message in prompt.messages] for prompt in columns["prompts"]]
        arguments["prompts"] = as_chat if as_messages else [prompt.text for prompt in columns["prompts"]]
        arguments["completion_ids"] = [list(ids) for ids in columns["completion_ids"]]
    return {
        **arguments,
        "trainer_state": trainer_state,
        "log_extra": notes.log_extra,
        "log_metric": notes.log_metric,
    }


def _copied(column: Sequence[Any]) -> list[Any]:
    try:
        return deepcopy(list(column))
    except RecursionError:  # a field may be nested some 900 deep
        return list(column)


@contextmanager
def _faults(timeout: float, count: int) -> Iterator[None]:
    """Turn whatever a user's function raises into Faulty."""
    try:
        yield
    except Faulty:
        raise
    except _TimedOut:
        raise _too_late(timeout, count) from None
    except BaseException as error:
        if by_ctrl_c(error):
            raise
        raise Faulty(f"raised {describe_exception(error)}") from None


def _numbers(returned: Any, count: int) -> list[float | None]:
    """Read one finite number or None for each completion. Raises Faulty."""
    # A set has no order, a mapping would give its keys, and bytes would pass as numbers.
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | bytearray | Mapping | Set):
        raise Faulty(f"returned {shown(returned)}, not a list of one number for each completion.")
    values = list(islice(returned, count + 1))  # a generator may be endless
    if len(values) != count:
        number = f"more than {count}" if len(values) > count else len(values)
        raise Faulty(f"returned {number} values for {count} completions, not one for each.")
    return [None if value is None else _number(value, index) for index, value in enumerate(values)]


def _number(value: Any, index: int) -> float:
    """Read a finite number, also a tensor without dimensions or a NumPy boolean. Raises Faulty."""
    number = value.item() if hasattr(value, "item") and not isinstance(value, Real) else value
    try:
        if isinstance(number, Real) and isfinite(number):
            return float(number)
    except (ArithmeticError, TypeError, ValueError):
        pass  # an integer too large for a float, a class that only claims to be a number
    raise Faulty(f"returned {shown(number)}; it must return finite numbers, or None.", [index])


# --- coroutines -------------------------------------------------------------------------------------------------


def _await_all(awaited: Mapping[str, Awaitable[Any]], count: int, timeout: float) -> dict[str, Outcome]:
    """Run these coroutines at the same time, each for at most `timeout` seconds."""
    tasks: dict[str, asyncio.Task[Outcome]] = {}
    late: Collection[asyncio.Task[Outcome]] = ()

    def run() -> None:
        nonlocal late
        loop = _event_loop()
        tasks.update({name: loop.create_task(_outcome(it, count, timeout)) for name, it in awaited.items()})
        with _time_limit(timeout, slack=2 * GRACE) as limit:  # the alarm is for code that blocks
            late = loop.run_until_complete(_end_all(tasks.values(), limit))

    fault = _too_late(timeout, count)
    try:
        with _faults(timeout, count):
            fenced(run)
    except Faulty as other:
        fault = other
    finally:
        for task in tasks.values():
            task.cancel()
    done = {name: task for name, task in tasks.items() if task.done() and task not in late}
    return {name: done[name].result() if name in done else fault for name in awaited}


async def _outcome(awaited: Awaitable[Any], count: int, timeout: float) -> Outcome:
    try:
        with _faults(timeout, count):
            return _numbers(await awaited, count)
    except Faulty as fault:
        return fault


async def _end_all(tasks: Iterable["asyncio.Task[Outcome]"], limit: "_Limit") -> Collection["asyncio.Task[Outcome]"]:
    """Wait for these tasks; cancel and return those that are not done in time."""
    late: Collection[asyncio.Task[Outcome]] = list(tasks)
    while late and (left := limit.left()) != 0:  # the limit may begin again while it waits
        _, late = await asyncio.wait(late, timeout=left)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=GRACE)
    return late


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of all calls: a client or a lock that a user's file keeps belongs to one loop."""
    return asyncio.new_event_loop()


# --- limits and messages ----------------------------------------------------------------------------------------


class _Limit:
    """Seconds that a call may take; they begin again when the process was stopped and continues (SIGCONT).

    A process cannot know how long it was stopped. The clock stands still while the machine sleeps.
    """

    def __init__(self, seconds: float, slack: float) -> None:
        """seconds: 0 for no limit. slack: the alarm rings so many seconds later."""
        self.seconds, self.slack = seconds, slack
        self.end = time.monotonic() + seconds
        self.rang = self.over = False
        self.process = os.getpid()

    def left(self) -> float | None:
        """Seconds left; None: no limit."""
        return max(0.0, self.end - time.monotonic()) if self.seconds else None

    def begin(self, *_: object) -> None:
        """Set the alarm: at the beginning, at SIGCONT, and when it has rung, for what else the call does."""
        if not self.over and os.getpid() == self.process:  # a child inherits the handler, but no alarm
            self.end, self.rang = time.monotonic() + self.seconds, False
            signal.setitimer(signal.ITIMER_REAL, self.seconds + self.slack)

    def ring(self, *_: object) -> None:
        """Raise _TimedOut at the second SIGALRM: a process that continues handles SIGCONT after the first one."""
        if self.rang and not self.over:
            self.begin()
            raise _TimedOut
        if not self.over:
            self.rang = True
            signal.setitimer(signal.ITIMER_REAL, MOMENT)


@contextmanager
def _time_limit(seconds: float, *, slack: float = 0.0) -> Iterator[_Limit]:
    """Raise _TimedOut in the body after `seconds`, or never at 0. The fence puts the signals back.

    It uses SIGALRM, so it works only in the main thread. It stops Python code, regular expressions, sleeping and
    waiting for a network. Other C code is interrupted when it returns to Python. A bare `except:` can catch the alarm,
    and a function that sets an alarm itself replaces ours. A worker thread is no alternative: it cannot be stopped, and
    verifiers that use signal.alarm do not run in one.
    """
    limit = _Limit(seconds, slack)
    if seconds:
        signal.signal(signal.SIGALRM, limit.ring)
        signal.signal(signal.SIGCONT, limit.begin)
        limit.begin()
    try:
        yield limit
    finally:
        limit.over = True  # a signal may have arrived that is not handled yet
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _too_late(timeout: float, count: int) -> Faulty:
    return Faulty(f"took longer than the {timeout:g} seconds of --reward_timeout.", range(count))


def describe_exception(error: BaseException, file: str | None = None) -> str:
    """Describe an exception on one line, with the last line of `file` in its traceback.

    file: None for the file of the function that was called.
    """
    reason = " ".join(f"{type(error).__name__}: {_written(error, str)}".split())[:LONGEST_REASON].removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{reason} ({Path(error.filename).name}, line {error.lineno})" if error.filename else reason
    frames = traceback.extract_tb(error.__traceback__)
    theirs = (f.filename for f in frames if not any(Path(f.filename).is_relative_to(path) for path in BETWEEN))
    file = file or next(theirs, None)
    within = [frame for frame in frames if frame.filename == file]
    if not within:
        return reason
    last = within[-1]
    return f"{reason} ({Path(last.filename).name}, line {last.lineno}: {(last.line or '')[:LONGEST_QUOTE]})"


def shown(value: object) -> str:
    """Show a value in an error. An integer of 5,000 digits has no repr, and a user's class may have none."""
    return " ".join(_written(value, repr).split())[:LONGEST_QUOTE] or f"a {type(value).__name__}"


def _written(value: object, write: Callable[[object], str]) -> str:
    """Return the text of a value, empty if it has none: a user's class may raise anything."""
    try:
        return write(value)
    except BaseException as error:
        if by_ctrl_c(error):
            raise
        return ""
