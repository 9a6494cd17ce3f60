"""`grpo_ds.train`: the numbers of the command, in the caller's process, which it leaves as it was."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from grpo_ds import TrainConfig, train
from grpo_ds.commands import in_python
from grpo_ds.commands.in_python import RENDEZVOUS
from grpo_ds.errors import MAX_LINES, CheckpointError, DataError, GrpoError, UsageError
from grpo_ds.models.presets import EMBEDDED
from grpo_ds.run_folder.inputs import _source, check_inputs
from grpo_ds.system.signals import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    {"question": f"Does dose {n} help?", "context": f"It helped {n} of 20.", "ground_truth": ("yes", "no")[n % 2]}
    for n in range(20)
]
SMALL = {
    "num_steps": 2, "num_generations": 2, "batch_size": 1, "max_prompt_length": 480, "max_completion_length": 6,
    "eval_limit": 2, "learning_rate": 1e-3, "save_steps": 1, "seed": 3,
}  # fmt: skip
REWARDS = """
async def short(completions, log_metric, **_):
    log_metric("words", 1.0)
    return [-len(text) / 100 for text in completions]
"""


async def short(completions, log_metric, **_):
    log_metric("words", 1.0)
    return [-len(text) / 100 for text in completions]


def other(completions, **_):
    return [0.0 for _ in completions]


def numbers(lines):
    """The metrics without what a clock or the machine's memory says."""
    machine = ("seconds", "memory", "tokens_per_second", "step_time")
    return [{name: it for name, it in line.items() if not name.startswith(machine)} for line in lines]


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


async def in_a_notebook(work):
    """A notebook runs its cells within a loop of its own."""
    return work()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("in_python")


@pytest.fixture(scope="module")
def trained(tiny_folder, folder):
    """Two runs in this process, the second in another thread; and what they changed of the process."""
    import torch

    from grpo_ds.training.engine import leave_group

    def state():
        return {
            "handlers": [signal.getsignal(number) for number in SIGNALS],
            "environment": {name: os.environ.get(name) for name in RENDEZVOUS},
            "random": random.getstate(),
            "torch's random": torch.random.get_rng_state().tolist(),
            "process group": torch.distributed.is_initialized(),
            "arguments and folder": (sys.argv, os.getcwd()),
        }

    def run(name):
        config = TrainConfig(model=str(tiny_folder), output_dir=str(folder / name), **SMALL)
        return train(config, data=RECORDS, reward_funcs=[short, "format"])

    leave_group()  # another test of this process may have joined one
    before = state()
    first = asyncio.run(in_a_notebook(partial(run, "first")))
    second = in_a_thread(partial(run, "second"))
    after = state()
    return first, second, [name for name, it in before.items() if after[name] != it]


def test_two_runs_in_one_process_have_the_numbers_of_the_command(trained, tiny_folder, folder):
    (folder / "mine.py").write_text(REWARDS)
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    flags = {
        "model": tiny_folder,
        "data": folder / "data.jsonl",
        "reward_funcs": f"{folder}/mine.py:short,format",
        "output_dir": folder / "command",
        **SMALL,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "grpo_ds", "train", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    command = [json.loads(line) for line in (folder / "command" / "metrics.jsonl").read_text().splitlines()]
    first, second, _ = trained
    assert len(command) == 2 and command[0]["rewards/short/mean"] < 0
    assert numbers(command) == numbers(first.metrics) == numbers(second.metrics)


def test_it_leaves_the_process_as_it_was(trained, folder):
    assert trained[2] == []
    assert not (folder / "first" / ".lock").exists() and "from_python" not in sys.modules


def test_it_returns_the_run(trained, folder):
    first, *_ = trained
    assert first.folder == folder / "first" and (first.folder / "model.safetensors").is_file()
    assert first.summary["steps"] == 2 and first.verdict.headline
    status = json.loads((first.folder / "run_status.json").read_text())
    checkpoint = str(first.folder / "checkpoint-2")
    assert status["state"] == "done"
    assert status["resume"] == f"train(TrainConfig(resume_from_checkpoint={checkpoint!r}), ...)"


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        ({"data": RECORDS, "reward_funcs": [other, "format"]}, "the reward functions"),
        ({"data": RECORDS[:-1], "reward_funcs": [short, "format"]}, "the training questions"),
        ({"reward_funcs": [short, "format"]}, "records were passed to it in Python"),
        ({"data": RECORDS}, "short was passed to this run in Python"),
    ],
)
def test_a_run_is_resumed_with_what_it_began_with(trained, passed, said):
    config = TrainConfig(resume_from_checkpoint=str(trained[0].folder), num_steps=3)
    with pytest.raises(GrpoError, match=said):
        train(config, **passed)
    assert not (trained[0].folder / ".lock").exists()


def test_a_changed_function_is_noticed_and_one_without_a_source_is_said_not_to_be_compared():
    scope = {}
    exec(REWARDS, scope)
    known, changed, unread = _source(partial(short)), _source(other), _source(scope["short"])
    assert known == _source(short) != changed and unread == _source(len) == ""
    name = "the reward function short"
    with pytest.raises(CheckpointError, match=name):
        check_inputs({name: known}, {name: changed}, Path("checkpoint-1"), may_change=False)
    for pair in ((known, unread), (unread, known), (unread, unread)):
        (line,) = check_inputs({name: pair[0]}, {name: pair[1]}, Path("checkpoint-1"), may_change=False)
        assert line == f"Warning: not compared, as Python cannot read its source: {name}"


CONFIG = TrainConfig(model=EMBEDDED, num_steps=2)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ([{"num_steps": 2}], UsageError, "takes a TrainConfig"),
        ([TrainConfig(num_steps="many", beta=float("nan"))], UsageError, "num_steps is 'many'"),
        ([TrainConfig(num_generations=1)], UsageError, "compares completions of a group"),
        ([TrainConfig(plan=True)], UsageError, "grpo-ds train --plan"),
        ([TrainConfig(num_seeds=3)], UsageError, "once for each seed"),
        ([TrainConfig(data="sample"), "sample"], UsageError, "data is given twice"),
        ([CONFIG, "nowhere.json"], DataError, "no data file nowhere.json"),
        ([CONFIG, [*RECORDS, "a text"]], DataError, "record 21 is a text, not a dictionary"),
        ([CONFIG, {"train": RECORDS, "test": RECORDS}], DataError, "pass one of them"),
        ([CONFIG, [*RECORDS, {"question": "Q?", "context": "C.", "ground_truth": "?"}]], DataError, "record 21"),
        ([CONFIG, []], DataError, "has no records"),
        ([CONFIG, RECORDS, [lambda completions: [0.0]]], UsageError, "has no name for its metric"),
        ([CONFIG, RECORDS, [short, short]], UsageError, "names 'short' twice"),
        ([CONFIG, RECORDS, [print, "correctnes"]], UsageError, "correctnes"),
        ([CONFIG, RECORDS, lambda: None], UsageError, "has no name"),
    ],
)
def test_a_mistake_is_an_error_of_ours_before_a_model_is_loaded(monkeypatch, tmp_path, arguments, error, said):
    monkeypatch.chdir(tmp_path)
    config, data, rewards, *_ = [*arguments, None, None]
    with pytest.raises(error) as caught:
        train(config, data=data, reward_funcs=rewards)
    message = str(caught.value)
    assert said in message and len(message.splitlines()) <= MAX_LINES
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time():
    with in_python._running, pytest.raises(UsageError, match="in progress"):
        train(CONFIG)


def test_a_recipe_replaces_what_was_not_given_alone():
    assert TrainConfig(seed=0, num_steps=3).given_flags == {"seed": 0, "num_steps": 3}
    assert replace(TrainConfig(seed=1, num_steps=3), seed=2).given_flags == {"seed": 2, "num_steps": 3}
    assert TrainConfig(model="a", seed=0) == TrainConfig(model="a")


def test_the_door_is_light():
    code = "import sys, grpo_ds; from grpo_ds import TrainConfig, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
