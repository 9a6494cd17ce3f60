"""`grpo_ds.train`: the command `train` for a script or a notebook, with records and reward functions as objects.

It runs in the caller's process and leaves it as it was: process group, environment, signal handlers, locks. Errors are
raised (grpo_ds/errors.py), never exited with.
"""

import asyncio
import gc
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo_ds.commands.train import begin, finish
from grpo_ds.errors import DataError, UsageError, one_error
from grpo_ds.run_folder.inputs import PASSED
from grpo_ds.run_folder.lock import release
from grpo_ds.settings.command_line import REMEDY, Parsed
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.flags import all_flags
from grpo_ds.settings.values import read_values
from grpo_ds.system.busy_machine import watch_cores
from grpo_ds.system.invocation import called_from_python
from grpo_ds.task.records import describe
from grpo_ds.task.sources import RECORDS, Source, rows_to_source

if TYPE_CHECKING:
    from grpo_ds.report.verdict import Verdict

Reward = Callable[..., Any] | str  # a function in TRL's form, or what --reward_funcs takes
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that a run sets
OF_A_SHELL = {
    "plan": "grpo-ds train --plan prints it",
    "num_seeds": "call train once for each seed: dataclasses.replace(config, seed=1)",
}
watch_cores_once = cache(watch_cores)  # as every command does: a run is faster beside other programs
_running = threading.Lock()  # a process has one process group, and one handler for each signal


@dataclass(frozen=True)
class TrainedRun:
    """A run that is done: its folder, and what is in it.

    Example:
        run = train(TrainConfig(num_steps=20))
        run.verdict.headline, run.metrics[-1]["reward"], run.summary["after"]["accuracy"]
    """

    folder: Path  # an ordinary model folder
    metrics: list[dict[str, Any]] = field(repr=False)  # a line for each step, and for each evaluation of eval_steps

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The outcome: summary.json, which the first rank writes."""
        from grpo_ds.report.run_files import read_json
        from grpo_ds.run_folder.files import SUMMARY_FILE

        return read_json(self.folder, SUMMARY_FILE)

    @cached_property
    def verdict(self) -> "Verdict":
        """Verdict on the run, whether it learned and why not: as the console, the report and the model card say it."""
        from grpo_ds.report import verdict
        from grpo_ds.report.run_files import read_run

        return verdict.of(read_run(self.folder))


def train(
    config: TrainConfig | None = None,
    *,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None,
    reward_funcs: Reward | Sequence[Reward] | None = None,
) -> TrainedRun:
    """Train a model and return the run. The same flags give the same numbers as `grpo-ds train`.

    config: flags; those that are not given take the model's recipe, as on the command line.
    data: a list of dictionaries, a datasets.Dataset, or what --data takes; in place of config.data.
    reward_funcs: functions, called as docs/rewards.md says, and names that --reward_funcs takes; in place of
        config.reward_funcs.
    Raises GrpoError: UsageError, DataError and others, and Interrupted after a signal, with everything saved.

    Example:
        def short(completions, **_):
            return [-len(text) / 100 for text in completions]

        train(TrainConfig(model="qwen2.5-0.5b", num_steps=20), data=records, reward_funcs=[short, "correctness"])
    """
    if not _running.acquire(blocking=False):
        raise UsageError(
            "A run is in progress in this process. Wait for it, or start the other one in its own process."
        )
    try:
        return _trained(TrainConfig() if config is None else config, data, reward_funcs)
    finally:
        _running.release()
        _free_memory()


def _trained(config: TrainConfig, data: Any, reward_funcs: Any) -> TrainedRun:
    with ExitStack() as put_back:
        for kept in (
            *(called_from_python, _environment_kept, _random_kept),
            *(_event_loop_hidden, _folder_released, _group_left),
        ):
            put_back.enter_context(kept())
        watch_cores_once()
        named = put_back.enter_context(_passed_functions(reward_funcs))
        run = begin(_parsed(config, data, named), _source(data))
        try:
            finish(run)
            return TrainedRun(run.folder, list(run.progress.log_history))
        finally:
            run.close()


# --- arguments --------------------------------------------------------------------------------------------------


def _parsed(config: TrainConfig, data: Any, reward_funcs: list[str] | None) -> Parsed[TrainConfig]:
    """Return the given flags, read and checked like those of a YAML file. Raises one UsageError for all."""
    if not isinstance(config, TrainConfig):
        raise UsageError(f"train takes a TrainConfig, not {describe(config)}: train(TrainConfig(num_steps=20), ...)")
    written = {name: _written(value) for name, value in config.given_flags.items()}
    twice = [
        name for name, it in (("data", data), ("reward_funcs", reward_funcs)) if it is not None and name in written
    ]
    shell = [
        f"{name}: {how}" for name, how in OF_A_SHELL.items() if getattr(config, name) != getattr(TrainConfig, name)
    ]
    if problems := [*shell, *(f"{name} is given twice, in the config and beside it" for name in twice)]:
        raise one_error(UsageError, "These arguments of train cannot work:", problems)
    if data is not None:
        written["data"] = os.fspath(data) if isinstance(data, str | os.PathLike) else RECORDS
    if reward_funcs is not None:
        written["reward_funcs"] = reward_funcs
    if threading.current_thread() is not threading.main_thread():
        written["reward_timeout"] = "0"  # an alarm reaches the main thread alone
    values, problems = read_values({flag.name: flag for flag in all_flags(TrainConfig)}, written)
    if problems:
        raise one_error(UsageError, "These settings cannot be read:", problems, REMEDY)
    return Parsed(TrainConfig, values)


def _written(value: Any) -> Any:
    """Return a value as YAML would hold it: a text, a list of texts, None."""
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    if value is None or isinstance(value, Mapping):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _source(data: Any) -> Source | None:
    """Return records that were passed as objects; None for a name. Raises DataError for what holds no records."""
    if data is None or isinstance(data, str | os.PathLike):
        return None
    if isinstance(data, Mapping):
        raise DataError(
            f"data is a dictionary of {', '.join(map(str, list(data)[:4]))}; pass one of them: data['train']"
        )
    rows = list(data) if isinstance(data, Iterable) else [data]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"data: record {number} is {describe(row)}, not a dictionary such as "
                '{"question": "...", "context": "...", "ground_truth": "yes"}.\n'
                "Pass a list of dictionaries or a datasets.Dataset; of a pandas.DataFrame its to_dict('records')."
            )
    return rows_to_source(RECORDS, rows)


@contextmanager
def _passed_functions(reward_funcs: Reward | Sequence[Reward] | None) -> Iterator[list[str] | None]:
    """Yield the entries of --reward_funcs; functions are found in a module of their own, as from_python.NAME."""
    if reward_funcs is None:
        yield None
        return
    module, entries = ModuleType(PASSED, "Reward functions that were passed to grpo_ds.train."), []
    for it in [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else reward_funcs:
        if isinstance(it, str):
            entries += it.split(",")
            continue
        name = _name(it)
        setattr(module, name, it)
        entries.append(f"{PASSED}.{name}")
    sys.modules[PASSED] = module
    try:
        yield entries
    finally:
        del sys.modules[PASSED]


def _name(function: Any) -> str:
    """Return the function's name in metrics, or its class's. Raises UsageError if it has none."""
    plain = function
    while isinstance(plain, partial):
        plain = plain.func
    name = str(getattr(plain, "__name__", type(plain).__name__))
    if not callable(function) or isinstance(function, type) or not name.isidentifier():
        raise UsageError(
            f"reward_funcs: {repr(function)[:80]} has no name for its metric, or cannot be called.\n"
            "It takes functions defined by def, objects with __call__, and names: correctness, FILE.py:FUNCTION."
        )
    return name


# --- the caller's process ---------------------------------------------------------------------------------------


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Put the variables of the process group back: they are not those of a later run, or of a child."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _random_kept() -> Iterator[None]:
    """Put Python's own random state back: libraries draw names of files from it. A run draws from its own streams."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _event_loop_hidden() -> Iterator[None]:
    """Let reward functions run coroutines: a notebook's own loop, which waits meanwhile, would not allow it."""
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)


@contextmanager
def _folder_released() -> Iterator[None]:
    try:
        yield
    finally:
        release()


@contextmanager
def _group_left() -> Iterator[None]:
    """Leave the process group also after an error, if it came to one."""
    try:
        yield
    finally:
        if engine := sys.modules.get("grpo_ds.training.engine"):
            engine.leave_group()


def _free_memory() -> None:
    """Free the run's memory for what comes next: its engine is in cycles, and torch keeps blocks of the card."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
