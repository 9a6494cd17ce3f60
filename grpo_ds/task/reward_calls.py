"""Calls of reward functions: the one place where users' functions run.

A call may raise, hang, return unusable values or return a coroutine. Coroutines of one batch are awaited together, as
in TRL. B completions; an outcome is a list of what the function returned, or what was wrong.
"""

import asyncio
import contextlib
import signal
import traceback
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import isawaitable
from itertools import islice
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from grpo_ds.task.rewards import OwnReward, RewardFunction

Columns = Mapping[str, Sequence[Any]]  # arguments of a reward function: name -> list of length B
LONGEST_QUOTE = 80  # characters of a completion, a value or a line of code that an error repeats
LONGEST_REASON = 160  # characters of an exception's message
GRACE = 0.5  # seconds that a cancelled coroutine may take to end
HERE = Path(__file__).parent


class Faulty(Exception):
    """A call that failed: what the function did, and at which completions (none: not known)."""

    def __init__(self, what: str, indices: Sequence[int] = ()) -> None:
        super().__init__(what)
        self.indices = indices


class _TimedOut(BaseException):
    """Time limit reached. It is no Exception, so that a function's `except Exception` does not catch it."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What a function logs about a batch through `log_extra` and `log_metric`."""

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


Outcome = list[Any] | Faulty


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
            with _faults(timeout, notes[name].count), _time_limit(timeout):
                returned = function(**_arguments(function, columns, trainer_state, notes[name]))
                if isawaitable(returned):
                    awaited[name] = returned
                else:
                    outcomes[name] = _listed(returned, notes[name].count)
        except Faulty as fault:
            outcomes[name] = fault
    if awaited:
        outcomes |= _await_all(awaited, len(columns["completions"]), timeout)
    return {name: (outcomes[name], notes[name]) for name in functions}


def _arguments(function: RewardFunction, columns: Columns, trainer_state: object, notes: Notes) -> dict[str, Any]:
    """Build the arguments of one call in the function's form; lists are copies, because it may change them."""
    as_messages = isinstance(function, OwnReward) and function.messages
    arguments: dict[str, Any] = {name: list(column) for name, column in columns.items()}
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


@contextmanager
def _faults(timeout: float, count: int) -> Iterator[None]:
    """Turn whatever a user's function raises into Faulty."""
    try:
        yield
    except Faulty:
        raise
    except _TimedOut:
        raise Faulty(f"took longer than the {timeout:g} seconds of --reward_timeout.", range(count)) from None
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # the message repeats it
        raise Faulty(f"raised {describe_exception(error)}") from None


def _listed(returned: Any, count: int) -> list[Any]:
    """List what a function returned, at most count + 1 entries: a generator may be endless."""
    # A set has no order, a mapping would give its keys, and bytes would pass as numbers.
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | bytearray | Mapping | Set):
        raise Faulty(f"returned {shown(returned)}, not a list of one number for each completion.")
    return [_number(value) for value in islice(returned, count + 1)]


def _number(value: Any) -> Any:
    """Return the number of a tensor without dimensions or a NumPy boolean; anything else as it is."""
    return value.item() if hasattr(value, "item") and not isinstance(value, Real) else value


# --- coroutines -------------------------------------------------------------------------------------------------


def _await_all(awaited: Mapping[str, Awaitable[Any]], count: int, timeout: float) -> dict[str, Outcome]:
    """Run these coroutines at the same time, each for at most `timeout` seconds."""
    loop = _event_loop()
    tasks = {name: loop.create_task(_outcome(it, count, timeout)) for name, it in awaited.items()}
    late: Collection[asyncio.Task[Outcome]] = ()
    try:
        with _faults(timeout, count), _time_limit(timeout and timeout + 2 * GRACE):  # the alarm is for code that blocks
            late = loop.run_until_complete(_end_all(tasks.values(), timeout))
    except Faulty as fault:
        late = [task for task in tasks.values() if not task.done()]
        if not late:
            return dict.fromkeys(tasks, fault)
    finally:
        for task in tasks.values():
            task.cancel()
    too_late = Faulty(f"took longer than the {timeout:g} seconds of --reward_timeout.", range(count))
    return {name: too_late if task in late else task.result() for name, task in tasks.items()}


async def _outcome(awaited: Awaitable[Any], count: int, timeout: float) -> Outcome:
    try:
        with _faults(timeout, count):
            return _listed(await awaited, count)
    except Faulty as fault:
        return fault


async def _end_all(tasks: Iterable["asyncio.Task[Outcome]"], timeout: float) -> Collection["asyncio.Task[Outcome]"]:
    """Wait for these tasks; cancel and return those that are not done in time."""
    _, late = await asyncio.wait(list(tasks), timeout=timeout or None)
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


@contextmanager
def all_within(seconds: float) -> Iterator[None]:
    """End the body without an error after `seconds`; 0: never."""
    try:
        with _time_limit(seconds):
            yield
    except _TimedOut:
        pass


def describe_exception(error: BaseException, file: str | None = None) -> str:
    """Describe an exception on one line, with the last line of `file` in its traceback.

    file: None for the file of the function that was called.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON].removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{reason} ({Path(error.filename).name}, line {error.lineno})" if error.filename else reason
    frames = traceback.extract_tb(error.__traceback__)
    theirs = (f.filename for f in frames if Path(f.filename).parent != HERE and f.filename != contextlib.__file__)
    file = file or next(theirs, None)
    within = [frame for frame in frames if frame.filename == file]
    if not within:
        return reason
    last = within[-1]
    return f"{reason} ({Path(last.filename).name}, line {last.lineno}: {(last.line or '')[:LONGEST_QUOTE]})"


def shown(value: object) -> str:
    """Show a value in an error. An integer of 5,000 digits has no repr, and a user's class may have none."""
    try:
        return " ".join(repr(value).split())[:LONGEST_QUOTE]
    except Exception:  # a user's class may raise anything
        return f"a {type(value).__name__}"
