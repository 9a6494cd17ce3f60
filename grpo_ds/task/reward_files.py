"""--reward_funcs: ready-made functions and FILE.py:FUNCTION, found and checked before a model is loaded."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from types import ModuleType

from grpo_ds.errors import UsageError, one_error
from grpo_ds.task.rewards import READY_MADE, RewardFunction, WeightedFunctions
from grpo_ds.task.scoring import describe_exception


def reward_problems(reward_funcs: str, reward_weights: str | None) -> list[str]:
    """Return every problem of these flags that can be found without opening a file."""
    entries = _entries(reward_funcs)
    names = [_name_of(entry) for entry in entries]
    unknown = [entry for entry in entries if ":" not in entry and entry not in READY_MADE]
    twice = sorted({name for name in names if names.count(name) > 1})
    count = "1 number" if len(entries) == 1 else f"{len(entries)} numbers"
    return [
        *(f"reward_funcs: {entry!r} is neither {', '.join(READY_MADE)} nor FILE.py:FUNCTION" for entry in unknown),
        *(f"reward_funcs names {name!r} twice; metrics could not tell them apart" for name in twice),
        *(
            [f"reward_weights is {reward_weights}; {reward_funcs} needs {count}, separated by commas"]
            if len(_weights(reward_weights, entries)) != len(entries)
            else []
        ),
    ]


def find_reward_functions(
    reward_funcs: str,
    reward_weights: str | None,
    *,
    ready_made: Mapping[str, RewardFunction],
    columns: Collection[str],
) -> WeightedFunctions:
    """Find the functions that these flags name, with their weights. The flags must have no `reward_problems`.

    columns: names of the data's columns other than id, question, context and label.
    Raises one UsageError for all files that are missing or cannot be imported, and all functions that are missing or
    cannot be called with these columns.
    """
    entries = _entries(reward_funcs)
    found: dict[str, tuple[RewardFunction, float]] = {}
    problems = []
    for entry, weight in zip(entries, _weights(reward_weights, entries), strict=True):
        path, _, name = entry.rpartition(":")
        try:
            function = _from_file(Path(os.path.expanduser(path.strip())), name.strip()) if path else ready_made[name]
            _check_call(function, columns)
        except _BadFunction as problem:
            problems.append(f"{entry}: {problem}")
        else:
            found[_name_of(entry)] = function, weight
    if problems:
        raise one_error(
            UsageError, "--reward_funcs cannot be used:", problems, "docs/rewards.md shows how to write one."
        )
    return found


class _BadFunction(Exception):
    """A function that cannot be used; the message says why."""


def _entries(reward_funcs: str) -> list[str]:
    return [entry.strip() for entry in reward_funcs.split(",")]


def _name_of(entry: str) -> str:
    """Name of a function in metrics: "concise" for my_rewards.py:concise."""
    return entry.rpartition(":")[2].strip()


def _weights(reward_weights: str | None, entries: Sequence[str]) -> list[float]:
    """Read the weights, 1 each by default; an empty list if any is not a finite number."""
    if reward_weights is None:
        return [1.0] * len(entries)
    try:
        weights = [float(weight) for weight in reward_weights.split(",")]
    except ValueError:
        return []
    return weights if all(map(isfinite, weights)) else []


def _from_file(path: Path, name: str) -> RewardFunction:
    if not os.path.isfile(path):  # unlike Path.is_file it does not raise for a name that is too long
        raise _BadFunction(f"there is no file {path} (in {Path.cwd()})")
    function = getattr(_module(path.resolve()), name, None)
    if not callable(function):
        raise _BadFunction(f"{path} has no function {name!r}")
    if inspect.iscoroutinefunction(function):
        raise _BadFunction("it is async; a reward function must be an ordinary function")
    return function


@cache  # two functions of one file share its module
def _module(path: Path) -> ModuleType:
    """Import the file as a module; it may import other files of its folder."""
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise _BadFunction(f"{path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything; the message repeats it
        raise _BadFunction(f"importing it fails with {describe_exception(error, str(path))}") from None
    return module


def _check_call(function: RewardFunction, columns: Collection[str]) -> None:
    """Check that `function(completions=..., question=..., ...)` can be called. Raises _BadFunction."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables have no signature
        return
    try:
        signature.bind(**dict.fromkeys(("completions", "id", "question", "context", "label", *columns)))
    except TypeError as error:
        wanted = "it gets completions= and every column of the data, so end its parameters with **kwargs"
        raise _BadFunction(f"{error}; {wanted}") from None
