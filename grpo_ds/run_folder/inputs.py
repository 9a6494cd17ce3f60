"""Inputs that decide a run's numbers besides its flags: each has a hash, which a resumed run compares.

The columns of the data are compared if a reward function can read them, and so are the files that it is made of
(task/reward_files.py); of a function that a script passes to `grpo_ds.train`, its own source text. What a function
reads elsewhere is not known here.
"""

import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from grpo_ds.errors import CheckpointError
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.task.own_rewards import columns_read
from grpo_ds.task.questions import Question
from grpo_ds.task.reward_files import reward_sources
from grpo_ds.task.rewards import ARGUMENTS, COLUMNS, OwnReward, WeightedFunctions

Inputs = dict[str, str]  # name of an input, as an error says it -> its hash
PROMPTS, BASE = "the token ids of the prompts", "the weights of the base model"  # known once they are loaded
REWARDS = "the reward functions"
LATE = {PROMPTS, BASE}
PASSED = "from_python"  # --reward_funcs has from_python.NAME for a function that was passed to grpo_ds.train
UNKNOWN = ""  # in place of a hash: the source text of such a function cannot be read
# The saved optimizer state or adapter fits these alone, so --resume_changed_inputs does not cover them.
FIXED = {"the DeepSpeed JSON", "the number of ranks", BASE}
NAMED = 6  # changed inputs that a message names
OLDER = "the questions"  # in a checkpoint of a version that compared fewer inputs


def inputs_of(
    train: Sequence[Question],
    held_out: Sequence[Question],
    config: TrainConfig,
    ds: DsConfig,
    rewards: WeightedFunctions,
    ranks: int,
) -> Inputs:
    """Return the hash of every input that is known before a model is loaded. held_out: before --eval_limit."""
    # A micro-batch of bnpo is the denominator of its loss; for other losses a split only changes the rounding.
    split = {"--pack_tokens, which decides the loss of bnpo": str(config.pack_tokens)}
    return {
        "the training questions": _hash([question_key(question) for question in train]),
        "the held-out questions": _hash([question_key(question) for question in held_out]),
        **{f"the column {name}": hashed for name, hashed in _columns(rewards, [*train, *held_out]).items()},
        REWARDS: _hash([text.strip().rpartition("/")[2] for text in config.reward_funcs.split(",")]),
        **{f"the reward file {name}": _hash(text) for name, text in reward_sources(config.reward_funcs).items()},
        **{f"the reward function {name}": _source(rewards[name][0]) for name in passed(config.reward_funcs)},
        "the system prompt": _hash(config.system_prompt_text or ""),
        **(split if config.loss_type == "bnpo" else {}),
        "the DeepSpeed JSON": _hash({**ds.engine, "optimizer": asdict(ds.optimizer), "rounding": ds.rounding}),
        "the number of ranks": str(ranks),
    }


def passed(reward_funcs: str) -> list[str]:
    """Return the names of the functions in --reward_funcs that were passed to grpo_ds.train."""
    entries = [entry.strip() for entry in reward_funcs.split(",")]
    return [entry.removeprefix(f"{PASSED}.") for entry in entries if entry.startswith(f"{PASSED}.")]


def changed_inputs(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the inputs that differ from a checkpoint's; one of an older version lacks some."""
    both = saved.keys() & now.keys()
    names = [name for name in {**now, **saved} if name in both or not (OLDER in saved or name in LATE)]
    return [
        name for name in names if saved.get(name) != now.get(name) and UNKNOWN not in (saved.get(name), now.get(name))
    ]


def check_inputs(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path, *, may_change: bool) -> list[str]:
    """Return lines that name the changed inputs. Raises CheckpointError for those that may not have changed."""
    changed = changed_inputs(saved, now)
    if refused := [name for name in changed if name in FIXED or not may_change]:
        raise other_inputs(str(checkpoint), refused)
    older = f"Warning: {checkpoint} was saved by an older version, so only these inputs were compared: "
    unread = [name for name in now if name in saved and UNKNOWN in (saved[name], now[name])]
    return [
        *([changed_line(changed)] if changed else []),
        *([f"Warning: not compared, as Python cannot read its source: {_listed(unread)}"] if unread else []),
        *([older + ", ".join(sorted(saved.keys() & now.keys()))] if OLDER in saved else []),
    ]


def other_inputs(checkpoint: str, changed: Sequence[str]) -> CheckpointError:
    """Return the error for inputs that are not those of the checkpoint."""
    again = "Use the same again"
    if not FIXED.intersection(changed):
        again += ", or continue all the same: --resume_changed_inputs true"
    same = "Questions, flags, template and tokenizer are the same, so a version differs: see environment.json.\n"
    return CheckpointError(
        f"{checkpoint} cannot be resumed: since it was saved, {_listed(changed)} changed.\n"
        f"{same if list(changed) == [PROMPTS] else ''}{again}.\n"
        f"Or train further from its weights in a new run: --model {checkpoint} --output_dir ANOTHER"
    )


def changed_line(changed: Sequence[str]) -> str:
    """Say that a run continues with other inputs."""
    return f"Warning: since the checkpoint was saved, {_listed(changed)} changed (--resume_changed_inputs)"


def shown_input(name: str) -> str:
    """Return an input's name as a list says it: with its remark in brackets."""
    first, _, remark = name.partition(", which ")
    return f"{first} (which {remark})" if remark else first


def _listed(names: Sequence[str]) -> str:
    """Return a list such as "a, b and c"."""
    shown = list(map(shown_input, names))
    shown = shown if len(shown) <= NAMED else [*shown[:NAMED], f"{len(shown) - NAMED} other inputs"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def question_key(question: Question) -> str:
    """Return a hash of everything that a prompt and a grade take from a question."""
    more = [part for part in (question.accepted, [dict(turn) for turn in question.messages]) if part]
    return _hash([question.id, question.text, question.context, question.label, *more])


def _columns(rewards: WeightedFunctions, questions: Sequence[Question]) -> Inputs:
    """Return the hash of each column that a reward function can read, over the records that have it."""
    read = [columns_read(function.function) for function, _ in rewards.values() if isinstance(function, OwnReward)]
    named = frozenset[str]().union(*(names for names in read if names))
    hashed: dict[str, Any] = {}
    for question in questions if read else ():
        own = getattr(question.columns, "maps", [question.columns])[0]  # without the columns that it lacks
        for name, value in own.items():
            if (None in read or name in named) and name not in (*ARGUMENTS, *COLUMNS) and value is not None:
                hashed.setdefault(name, hashlib.sha256()).update(_json([question.id, value]))
    return {name: it.hexdigest() for name, it in sorted(hashed.items())}


def _source(function: Any) -> str:
    """Return the hash of a function's source text, or of its object's class; UNKNOWN if Python cannot read it."""
    function = function.function if isinstance(function, OwnReward) else function
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    try:
        text = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):  # typed at a prompt, run by exec, or written in C
        return UNKNOWN
    return _hash(textwrap.dedent(text))


def _hash(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_as_text).encode()


def _as_text(value: Any) -> str:
    """Spell a value that JSON does not have; an image or a sound of a hub data set is only known by its kind."""
    exact = (date, time, timedelta, Decimal, bytes)
    return repr(value) if isinstance(value, exact) else type(value).__name__
