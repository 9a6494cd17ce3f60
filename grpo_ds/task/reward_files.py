"""--reward_funcs: ready-made functions, FILE.py:FUNCTION and module.FUNCTION, found before a model is loaded."""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from grpo_ds.errors import UsageError, one_error
from grpo_ds.system.fence import by_ctrl_c, fenced
from grpo_ds.task.own_rewards import BadFunction, CompletionFormat, own_reward
from grpo_ds.task.reward_calls import describe_exception
from grpo_ds.task.reward_sources import folder_of_imports, hashes_of
from grpo_ds.task.rewards import OVERLONG, READY_MADE, OwnReward, RewardFunction, WeightedFunctions

IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+(\(\))?")  # module.FUNCTION, as in TRL's --reward_funcs
OURS = (*READY_MADE, OVERLONG)  # names of rewards in metrics that a user's function cannot have
FORMS = "FILE.py:FUNCTION nor module.FUNCTION"


def reward_problems(reward_funcs: str, reward_weights: str | None) -> list[str]:
    """Return every problem of these flags that can be found without opening a file."""
    entries = _entries(reward_funcs)
    names = [entry.metric for entry in entries]
    unknown = [entry.text for entry in entries if not entry.source and entry.text not in READY_MADE]
    twice = sorted({name for name in names if names.count(name) > 1})
    taken = [entry.text for entry in entries if entry.source and entry.metric in OURS and entry.metric not in twice]
    count = "1 number" if len(entries) == 1 else f"{len(entries)} numbers"
    return [
        *(f"reward_funcs: {entry!r} is neither {', '.join(READY_MADE)}, {FORMS}" for entry in unknown),
        *(f"reward_funcs names {name!r} twice; metrics could not tell them apart" for name in twice),
        *(f"reward_funcs: {text} has the name of one of ours, {', '.join(OURS)}; rename it" for text in taken),
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
    completion_format: CompletionFormat = "auto",
) -> WeightedFunctions:
    """Find the functions that these flags name, with their weights. The flags must have no `reward_problems`.

    columns: names of the data's columns other than id, question, context and label.
    completion_format: form in which a user's functions get completions; auto: the one that each reads.
    Raises one UsageError for all files that are missing or cannot be imported, and all functions that are missing or
    cannot be called with these columns.
    """
    entries = _entries(reward_funcs)
    found: dict[str, tuple[RewardFunction, float]] = {}
    problems = []
    for entry, weight in zip(entries, _weights(reward_weights, entries), strict=True):
        try:
            own = fenced(partial(_own, entry, columns, completion_format)) if entry.source else ready_made[entry.name]
        except BadFunction as problem:
            problems.append(f"{entry.text}: {problem}")
        else:
            found[entry.metric] = own, weight
    if problems:
        raise one_error(
            UsageError, "--reward_funcs cannot be used:", problems, "docs/rewards.md shows how to write one."
        )
    return found


def reward_sources(reward_funcs: str) -> dict[str, list[str]]:
    """Return the hashes of the files that a user's functions are made of, by their names.

    reward_funcs: flags whose functions have been found. docs/rewards.md says which files these are.
    """
    files = set[tuple[Path, Path]]()
    for entry in _entries(reward_funcs):
        if ":" in entry.text:
            path = Path(os.path.expanduser(entry.source)).resolve()
            files.add((path, path.parent))
        elif entry.source and (file := getattr(sys.modules.get(entry.source), "__file__", None)):
            files.add((Path(file), folder_of_imports(Path(file))))
    return hashes_of(files)


def form_lines(functions: WeightedFunctions) -> list[str]:
    """Return a line that names the functions that get completions as messages, if there are any."""
    names = [name for name, (it, _) in functions.items() if isinstance(it, OwnReward) and it.messages]
    return [f"Rewards: completions are lists of messages for {', '.join(names)} (--completion_format)"] if names else []


class _Entry(NamedTuple):
    """An entry of --reward_funcs.

    Example:
        _Entry("my_rewards.py:Judge()", "my_rewards.py", "Judge()")
    """

    text: str
    source: str  # a file or a module; "" for a ready-made function
    name: str

    @property
    def metric(self) -> str:
        """Name of the function in metrics: "Judge" for my_rewards.py:Judge()."""
        return self.name.removesuffix("()")


def _entries(reward_funcs: str) -> list[_Entry]:
    return [_entry(text.strip()) for text in reward_funcs.split(",")]


def _entry(text: str) -> _Entry:
    mark = ":" if ":" in text else "." if IMPORT_PATH.fullmatch(text) and not text.endswith(".py") else ""
    source, _, name = text.rpartition(mark) if mark else ("", "", text)
    return _Entry(text, source.strip(), name.strip())


def _weights(reward_weights: str | None, entries: Sequence[_Entry]) -> list[float]:
    """Read the weights, 1 each by default; an empty list if any is not a finite number."""
    if reward_weights is None:
        return [1.0] * len(entries)
    try:
        weights = [float(weight) for weight in reward_weights.split(",")]
    except ValueError:
        return []
    return weights if all(map(isfinite, weights)) else []


def _own(entry: _Entry, columns: Collection[str], completion_format: CompletionFormat) -> OwnReward:
    found = _made(entry)
    with _bad_if_raised("looking at it"):  # an object may answer any question about it with an error
        return own_reward(found, columns, completion_format)


@contextmanager
def _bad_if_raised(what: str, file: str | None = None) -> Iterator[None]:
    """Turn whatever users' code raises into BadFunction. file: see describe_exception."""
    try:
        yield
    except BadFunction:
        raise
    except BaseException as error:
        if by_ctrl_c(error):
            raise
        raise BadFunction(f"{what} fails with {describe_exception(error, file)}") from None


def _made(entry: _Entry) -> Any:
    """Return what the entry names; `Name()` is what Name returns when it is called without arguments."""
    found = _imported(entry)
    if entry.name.endswith("()") and callable(found):
        with _bad_if_raised("calling it"):
            found = found()
        if not callable(found):
            raise BadFunction(f"what {entry.name} makes cannot be called; its class needs a method __call__")
    if inspect.isclass(found):
        raise BadFunction(f"it is a class, not an object of it; {_instantiated(found, entry)}")
    if not callable(found):
        raise BadFunction(f"{entry.source} has no function {entry.name!r}")
    return found


def _instantiated(found: type, entry: _Entry) -> str:
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):  # it needs arguments
        return f"write reward = {entry.name}(...) into the file, with its arguments, and name reward"
    return f"write {entry.text}()"


def _imported(entry: _Entry) -> Any:
    """Import the entry's file or module; None if it has no such name."""
    path = Path(entry.source)
    if is_file := ":" in entry.text:
        if not os.path.isfile(path):  # unlike Path.is_file it does not raise for a name that is too long
            raise BadFunction(f"there is no file {path}")
        path = path.resolve()
    with _bad_if_raised("importing it", str(path)):
        module = _module(path, path.stat().st_mtime_ns) if is_file else _named_module(entry.source)
        return getattr(module, entry.metric, None)  # a lazy module imports here


@cache  # two functions of one file share its module
def _module(path: Path, _written: int) -> ModuleType:
    """Import the file as a module, again if it was edited; it may import other files of its folder."""
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadFunction(f"{path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _named_module(name: str) -> ModuleType:
    """Import a module by its name; the working folder is searched too, as by TRL."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
