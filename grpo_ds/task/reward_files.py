"""--reward_funcs: names of ready-made functions and FILE.py:FUNCTION, found and checked before a model is loaded."""

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
from grpo_ds.task.scoring import in_a_line


def reward_problems(reward_funcs: str, reward_weights: str | None) -> list[str]:
    """All that is wrong with these flags and can be told without opening a file."""
    words = _words(reward_funcs)
    names = [_name_of(word) for word in words]
    unknown = [word for word in words if ":" not in word and word not in READY_MADE]
    twice = sorted({name for name in names if names.count(name) > 1})
    count = "1 number" if len(words) == 1 else f"{len(words)} numbers"
    return [
        *(f"reward_funcs: {word!r} is neither {', '.join(READY_MADE)} nor FILE.py:FUNCTION" for word in unknown),
        *(f"reward_funcs names {name!r} twice; metrics could not tell them apart" for name in twice),
        *(
            [f"reward_weights is {reward_weights}; {reward_funcs} needs {count}, separated by commas"]
            if len(_weights(reward_weights, words)) != len(words)
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
    """The functions these flags name, with their weights. Takes flags without `reward_problems`.

    columns: what the data has besides id, question, context and label.
    Raises UsageError, one for every file that is missing or does not import, and every function that is missing
    or cannot be called with these columns.
    """
    words = _words(reward_funcs)
    found: dict[str, tuple[RewardFunction, float]] = {}
    problems = []
    for word, weight in zip(words, _weights(reward_weights, words), strict=True):
        path, _, name = word.rpartition(":")
        try:
            function = _from_file(Path(os.path.expanduser(path.strip())), name.strip()) if path else ready_made[name]
            _check_call(function, columns)
        except _Unusable as problem:
            problems.append(f"{word}: {problem}")
        else:
            found[_name_of(word)] = function, weight
    if problems:
        raise one_error(
            UsageError, "--reward_funcs cannot be used:", problems, "docs/rewards.md shows how to write one."
        )
    return found


class _Unusable(Exception):
    """One function cannot be used; the message says why."""


def _words(reward_funcs: str) -> list[str]:
    return [word.strip() for word in reward_funcs.split(",")]


def _name_of(word: str) -> str:
    """A function's name in metrics: `my_rewards.py:concise` is concise."""
    return word.rpartition(":")[2].strip()


def _weights(reward_weights: str | None, words: Sequence[str]) -> list[float]:
    """1 each by default; none where they are not all finite numbers."""
    if reward_weights is None:
        return [1.0] * len(words)
    try:
        weights = [float(weight) for weight in reward_weights.split(",")]
    except ValueError:
        return []
    return weights if all(map(isfinite, weights)) else []


def _from_file(path: Path, name: str) -> RewardFunction:
    if not os.path.isfile(path):  # unlike Path.is_file it has an answer for a name too long for any file
        raise _Unusable(f"there is no file {path} (in {Path.cwd()})")
    function = getattr(_module(path.resolve()), name, None)
    if not callable(function):
        raise _Unusable(f"{path} has no function {name!r}")
    if inspect.iscoroutinefunction(function):
        raise _Unusable("it is async, but a reward function is called and not awaited")
    return function


@cache  # two functions of one file share its module
def _module(path: Path) -> ModuleType:
    """The file as a module; beside it may lie others that it imports."""
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise _Unusable(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises is theirs to read
        raise _Unusable(f"importing it fails with {in_a_line(error, str(path))}") from None
    return module


def _check_call(function: RewardFunction, columns: Collection[str]) -> None:
    """Whether `function(completions=..., question=..., ...)` can be called at all."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables have none to look at
        return
    try:
        signature.bind(**dict.fromkeys(("completions", "id", "question", "context", "label", *columns)))
    except TypeError as error:
        raise _Unusable(f"{error}; it gets completions= and every column of the data: let it end in **kwargs") from None
