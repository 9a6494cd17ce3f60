"""The inputs of a run that its flags do not show: a change is named, or it changes nothing."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from grpo_ds.errors import MAX_LINES, CheckpointError
from grpo_ds.run_folder.inputs import FIXED, OLDER, PROMPTS, check_inputs, inputs_of
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.task import reward_files
from grpo_ds.task.questions import read_questions
from grpo_ds.task.reward_files import find_reward_functions

pytestmark = pytest.mark.faults("inputs that change before a resume")

ROOT = Path(__file__).resolve().parents[2]
MINE = """
import shared
from words import long as count

def reads_gold(completions, gold, **kwargs): return [0.0] * len(completions)
def other(completions): return [1.0] * len(completions)
def reads_all(completions, **columns):
    from lib.deep import weight
    return [columns["note"] or 0.0] * len(completions)
"""
FILES = {
    "mine.py": MINE,
    "shared.py": "X = 1",
    "words.py": "import json\ndef long(text): return len(text) > 3",
    "lib/__init__.py": "",
    "lib/deep.py": "from . import base\nfrom .base import *\nweight = 1",
    "lib/base.py": "one = 1",
    "two.py": "def reads_gold(completions, gold): return gold\ndef other(completions): return [2.0] * len(completions)",
    "unused.py": "Y = 1",
}


def record(i: int) -> dict:
    own = {"gold": i / 7, "note": None if i else "only here", "spread": {"b": [i], "a": "x"}}
    return {"id": str(i), "question": f"Does it work {i} times?", "context": "C.", "ground_truth": "yes", **own}


class Run:
    """The files and flags of a run; a change is a function of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks = folder, 1
        self.config = TrainConfig(loss_type="bnpo", reward_funcs="{0}/mine.py:reads_gold,format")
        self.records = [record(i) for i in range(20)]
        for name, text in FILES.items():
            self.write(name, text)
        self.ds = json.loads((ROOT / "ds_configs/zero2.json").read_text())

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def flags(self, **changes) -> None:
        self.config = replace(self.config, **changes)

    def inputs(self) -> dict[str, str]:
        self.write("data.json", json.dumps(self.records))
        self.write("ds.json", json.dumps(self.ds))
        reward_files._module.cache_clear()
        config = replace(self.config, reward_funcs=self.config.reward_funcs.format(self.folder))
        found = read_questions(str(self.folder / "data.json")).questions
        ready_made = {"format": lambda **_: []}
        rewards = find_reward_functions(config.reward_funcs, None, ready_made=ready_made, columns=found[0].columns)
        ds = resolve_ds_config(self.folder / "ds.json", fill=config.ds_sizes(native="fp32"))
        return inputs_of(found[:16], found[16:], config, ds, rewards, self.ranks)


def moved(run: Run) -> None:
    for name in FILES:
        run.write(f"elsewhere/{name}", FILES[name])
    run.folder /= "elsewhere"


def reading_all(run: Run) -> None:
    run.flags(reward_funcs="{0}/mine.py:reads_all")


def prompted(run: Run) -> None:
    run.write("prompt.txt", "Answer in two tags.")
    run.flags(system_prompt=str(run.folder / "prompt.txt"))


# before -> (what the run was started with, what has changed, the inputs that are named)
CASES = {
    "a column that is read": (None, lambda run: run.records[3].update(gold=9), ["the column gold"]),
    "a column that loses a value": (None, lambda run: run.records[3].pop("gold"), ["the column gold"]),
    "a column that is not read": (None, lambda run: run.records[3].update(spread=9), []),
    "**columns": (reading_all, lambda run: run.records[3].update(spread=9), ["the column spread"]),
    "a new column": (reading_all, lambda run: run.records[3].update(new=9), ["the column new"]),
    "null is no value": (reading_all, lambda run: run.records[3].pop("note"), []),
    "another order of keys": (reading_all, lambda run: run.records[3].update(spread={"a": "x", "b": [3]}), []),
    "a label": (None, lambda run: run.records[19].update(ground_truth="no"), ["the held-out questions"]),
    "an order": (None, lambda run: run.records.insert(0, run.records.pop(3)), [
        "the training questions", "the column gold"]),
    "the reward file": (None, lambda run: run.write("mine.py", f"{MINE}\nZ = 1"), ["the reward file mine.py"]),
    "a file that it imports": (None, lambda run: run.write("shared.py", "X = 2"), ["the reward file shared.py"]),
    "a name from a file": (None, lambda run: run.write("words.py", "long = len"), ["the reward file words.py"]),
    "an import within": (None, lambda run: run.write("lib/deep.py", "weight = 2"), [
        "the reward file lib/deep.py", "the reward file lib/base.py"]),
    "a relative import": (None, lambda run: run.write("lib/base.py", "one = 2"), ["the reward file lib/base.py"]),
    "a file that is not imported": (None, lambda run: run.write("unused.py", "Y = 2"), []),
    "the same files elsewhere": (None, moved, []),
    "another function": (None, lambda run: run.flags(reward_funcs="format"), [
        "the reward functions", "the column gold",
        *(f"the reward file {name}" for name in sorted(FILES) if name not in ("unused.py", "two.py"))]),
    "a function of the same name": (
        lambda run: run.flags(reward_funcs="{0}/mine.py:reads_gold,{0}/two.py:other"),
        lambda run: run.flags(reward_funcs="{0}/two.py:reads_gold,{0}/mine.py:other"), ["the reward functions"]),
    "--pack_tokens with bnpo": (None, lambda run: run.flags(pack_tokens=4000), [
        "--pack_tokens, which decides the loss of bnpo"]),
    "--pack_tokens with grpo": (lambda run: run.flags(loss_type="grpo"), lambda run: run.flags(pack_tokens=4000), []),
    "--eval_limit": (None, lambda run: run.flags(eval_limit=2), []),
    "the system prompt": (None, prompted, ["the system prompt"]),
    "the JSON": (None, lambda run: run.ds.update(gradient_clipping=0.5), ["the DeepSpeed JSON"]),
    "the ranks": (None, lambda run: setattr(run, "ranks", 2), ["the number of ranks"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_changed_input_is_named_refused_and_accepted_if_asked(name, tmp_path):
    before, change, expected = CASES[name]
    run = Run(tmp_path)
    if before:
        before(run)
    saved = run.inputs()
    change(run)
    now = run.inputs()
    if not expected:
        assert check_inputs(saved, now, tmp_path, may_change=False) == []
        return
    with pytest.raises(CheckpointError) as error:
        check_inputs(saved, now, tmp_path, may_change=False)
    named = expected if len(expected) <= 6 else [*expected[:6], f"{len(expected) - 6} other inputs"]
    named = [name.replace(", which decides the loss of bnpo", " (which decides the loss of bnpo)") for name in named]
    listed = ", ".join(named[:-1]) + " and " * (len(named) > 1) + named[-1]
    assert f"since it was saved, {listed} changed" in str(error.value)
    assert len(str(error.value).splitlines()) <= MAX_LINES
    if FIXED & {*expected}:
        assert "--resume_changed_inputs" not in str(error.value)
        with pytest.raises(CheckpointError):
            check_inputs(saved, now, tmp_path, may_change=True)
    else:
        assert "--resume_changed_inputs true" in str(error.value)
        (line,) = check_inputs(saved, now, tmp_path, may_change=True)
        assert all(what in line for what in named)


def test_a_reward_in_a_module_is_followed_within_its_folder(tmp_path, monkeypatch):
    run = Run(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run.flags(reward_funcs="lib.deep.weight")
    assert {*reward_files.reward_sources("lib.deep.weight")} == set()  # not imported yet
    run.write("lib/deep.py", "from . import base\ndef weight(completions): return [0.0]")
    now = run.inputs()
    files = {name for name in now if name.startswith("the reward file ")}
    assert files == {f"the reward file lib/{name}.py" for name in ("__init__", "deep", "base")}


def test_a_checkpoint_of_an_older_version_is_compared_as_far_as_it_can_be(tmp_path):
    now = Run(tmp_path).inputs()
    common = ("the system prompt", "the DeepSpeed JSON", "the number of ranks")
    older = {OLDER: "5ec2", PROMPTS: "17", **{name: now[name] for name in common}}
    (line,) = check_inputs(older, now, tmp_path, may_change=False)
    assert "older version" in line and all(name in line for name in common)
    with pytest.raises(CheckpointError, match="the system prompt changed"):
        check_inputs({**older, "the system prompt": "0"}, now, tmp_path, may_change=False)


def test_values_that_json_does_not_have_are_compared_as_far_as_they_say_what_they_are(tmp_path):
    from grpo_ds.run_folder.inputs import _json

    assert _json([date(2026, 2, 1), b"a"]) != _json([date(2026, 2, 2), b"a"]) != _json([date(2026, 2, 2), b"b"])
    assert _json([object()]) == _json([object()])  # an image's own text holds its address
