"""Numbers that become NaN or infinite in a run: the step is skipped or the run ends, with the number named, and such
weights are not saved."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_ds.errors import MAX_LINES, NumbersError, PreflightError, RewardError
from grpo_ds.models.policy import first_bad_weight
from grpo_ds.training.nonfinite import BAD_BATCH
from grpo_ds.training.run import Run
from grpo_ds.training.update import step_weights
from tests.training.test_training import ROOT, letters_reward, tiny_trainer

KIND = "bad numbers"
SMALL = {"num_generations": 4, "max_completion_length": 4, "learning_rate": 1e-3}


def make(folder, reward=letters_reward, **changes):
    """A trainer with this reward function, its questions, and its messages about bad steps."""
    trainer, train, held_out = tiny_trainer(folder, **{**SMALL, **changes})
    trainer.collector.score.keywords["functions"]["letters"] = (reward, 1.0)
    messages = []
    trainer.bad_steps.say = messages.append
    return trainer, train, held_out, messages


class At:
    """Good rewards; in the calls of `steps` (one call a step) `spoil(rewards)` runs first and may return others."""

    def __init__(self, steps, spoil):
        self.steps, self.spoil, self.calls = steps, spoil, 0

    def __call__(self, completions, **_):
        self.calls += 1
        rewards = letters_reward(completions)
        return (self.calls in self.steps and self.spoil(rewards)) or rewards


class NanReference:
    """Good rewards; in these steps the reference of `trainer` computes NaN."""

    def __init__(self, steps):
        self.steps, self.trainer, self.calls = steps, None, 0

    def __call__(self, completions, **_):
        self.calls += 1
        norm = self.trainer.reference.model.model.model.norm.weight.data
        norm[3] = torch.nan if self.calls in self.steps else 1.0
        return letters_reward(completions)


def metrics_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_number_that_is_not_finite_skips_its_step_and_the_run_goes_on(tiny_folder, tmp_path, tried):
    spoiled = NanReference({2})
    spoiled.trainer, train, held_out, messages = make(tiny_folder, spoiled, num_steps=3)
    trainer = spoiled.trainer
    Run(trainer, train, held_out, tmp_path / "run").run()
    metrics = metrics_of(tmp_path / "run")
    assert [line["bad_steps"] for line in metrics] == [0, 1, 0]
    assert metrics[1]["loss"] is None and metrics[1]["grad_norm"] is None and metrics[2]["loss"] is not None
    assert (
        len(messages) == 1
        and "Step 2 is skipped" in messages[0]
        and "reference log-prob (completion 1 of question" in messages[0]
    )
    assert first_bad_weight(AutoModelForCausalLM.from_pretrained(tmp_path / "run")) is None
    assert not (tmp_path / "run" / BAD_BATCH).exists()
    trainer.engine.close()
    tried(KIND, "step skipped by name")


def test_a_skipped_step_moves_no_weight(tiny_folder, tmp_path, tried):
    spoiled = NanReference({1})
    spoiled.trainer, train, _, _ = make(tiny_folder, spoiled, num_steps=1)
    trainer = spoiled.trainer
    before = [p.detach().clone() for p in trainer.engine.model.parameters()]
    Run(trainer, train, [], tmp_path).train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.engine.model.parameters(), before, strict=True))
    assert trainer.engine._engine.global_steps == 0
    trainer.engine.close()
    tried(KIND, "step skipped by name")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_an_error_of_its_function(tiny_folder, tmp_path, tried, value):
    trainer, train, _, _ = make(tiny_folder, At({1}, lambda rewards: [value, *rewards[1:]]), num_steps=1)
    with pytest.raises(RewardError, match=r"'letters' returned .*; it must return finite numbers"):
        Run(trainer, train, [], tmp_path).train()
    trainer.engine.close()
    tried(KIND, "run ended by name")


def test_bad_steps_with_good_ones_between_do_not_end_the_run(tiny_folder, tmp_path, tried):
    spoiled = NanReference({1, 2, 4, 5})
    spoiled.trainer, train, _, messages = make(tiny_folder, spoiled, num_steps=6, max_bad_steps=2)
    trainer = spoiled.trainer
    Run(trainer, train, [], tmp_path).train()
    assert [line["bad_steps"] for line in metrics_of(tmp_path)] == [1, 1, 0, 1, 1, 0] and len(messages) == 4
    trainer.engine.close()
    tried(KIND, "step skipped by name")


def ends_by_name(trainer, train, folder, *, words, remedy):
    """Check how the run ends, and return the batch that it saved."""
    with pytest.raises(NumbersError) as error:
        Run(trainer, train, [], folder).train()
    assert error.value.exit_code == 6 and len(str(error.value).splitlines()) <= MAX_LINES
    assert words in str(error.value) and remedy in str(error.value)
    batch = json.loads((folder / BAD_BATCH).read_text())
    assert len(batch["completions"]) == 8 and {"text", "tokens", "rewards"} <= batch["completions"][0].keys()
    trainer.engine.close()
    return batch


def test_a_weight_that_becomes_nan_ends_the_run_and_is_not_saved(tiny_folder, tmp_path, tried):
    def plant(_):
        trainer.engine.model.model.layers[0].mlp.up_proj.weight.data[1, 2] = torch.nan

    trainer, train, _, messages = make(tiny_folder, At({2}, plant), num_steps=9, max_bad_steps=2)
    batch = ends_by_name(trainer, train, tmp_path, words="steps 2 to 4", remedy="The policy itself")
    assert batch["bad"][0].startswith("log-prob") and len(messages) == 3
    assert all(row["logprobs"]["policy"]["not_finite"] == row["tokens"] for row in batch["completions"])
    with pytest.raises(NumbersError, match=r"The model is not saved: its weight model.layers.0.mlp.up_proj.weight"):
        Run(trainer, [], [], tmp_path / "model").save_model()
    assert not (tmp_path / "model").exists()
    tried(KIND, "run ended by name, batch saved")
    tried(KIND, "weights not saved")


def test_a_folder_with_a_weight_of_nan_is_refused_before_it_is_trained(tiny_folder, tmp_path, tried):
    trainer, train, held_out, _ = make(tiny_folder)
    trainer.engine.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(PreflightError, match=r"model.norm.weight is not finite"):
        Run(trainer, train, held_out, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
    trainer.engine.close()
    tried(KIND, "refused before training")


def test_a_reference_of_nan_ends_the_run(tiny_folder, tmp_path, tried):
    def plant(_):
        trainer.reference.model.model.model.norm.weight.data[3] = torch.nan

    trainer, train, _, _ = make(tiny_folder, At({1}, plant), num_steps=9, max_bad_steps=0)
    batch = ends_by_name(trainer, train, tmp_path, words="step 1:", remedy="--reference bf16")
    assert batch["bad"][0].startswith("reference log-prob")
    assert all(row["logprobs"]["policy"]["not_finite"] == 0 for row in batch["completions"])
    tried(KIND, "run ended by name, batch saved")


def test_a_loss_that_overflows_ends_the_run(tiny_folder, tmp_path, tried):
    """The learning rate moves the policy far from the reference, and the weight of the KL is enormous."""
    changes = {"learning_rate": 1.0, "beta": 1e38, "reference": "bf16", "max_bad_steps": 1}
    trainer, train, _, _ = make(tiny_folder, num_steps=9, **changes)
    batch = ends_by_name(trainer, train, tmp_path, words="steps 2 to 3", remedy="lower --learning_rate")
    assert batch["bad"][0] == "loss"
    tried(KIND, "run ended by name, batch saved")


def test_a_gradient_that_overflows_ends_the_run(tiny_folder, tmp_path, tried, monkeypatch):
    """A loss that fp32 can hold, with a gradient norm that it cannot."""
    monkeypatch.setattr("grpo_ds.training.update.step_weights", lambda *of: 1e25 * step_weights(*of))
    trainer, train, _, _ = make(tiny_folder, num_steps=9, max_bad_steps=1)
    batch = ends_by_name(trainer, train, tmp_path, words="steps 1 to 2", remedy="smaller rewards")
    assert batch["bad"][0].startswith("gradient (model.")
    tried(KIND, "run ended by name, batch saved")


def test_the_script_ends_in_six_lines_and_exit_code_6(tiny_folder, tmp_path, tried):
    (tmp_path / "row.py").write_text("def row(completions, **_):\n    return list(range(len(completions)))\n")
    flags = {
        "model": tiny_folder, "data": "sample", "reward_funcs": f"{tmp_path / 'row.py'}:row", "max_bad_steps": 1,
        "learning_rate": 1e38,
        "max_prompt_length": 700, "max_completion_length": 4, "num_generations": 2, "eval_limit": 2, "num_steps": 9,
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "launch/train.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ)
    assert result.returncode == 6, result.stderr[-2000:]
    message = result.stderr[result.stderr.index("Error: ") :].strip()
    assert len(message.splitlines()) <= MAX_LINES and "Traceback" not in result.stderr
    assert "steps 2 to 3" in message and "lower --learning_rate" in message
    assert "Preflight passed:" in result.stdout and "Step 3 is skipped (2 in a row, of at most 1)" in result.stdout
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert BAD_BATCH in written and not {"model.safetensors", "summary.json"} & written
    tried(KIND, "run ended by name, batch saved")


@pytest.mark.parametrize(("package", "version"), [("deepspeed", "0.18.9"), ("transformers", "4.57.0")])
def test_a_version_known_to_lose_gradients_is_refused_before_a_model_is_loaded(tmp_path, tried, package, version):
    described = tmp_path / "site" / f"{package}-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    command = [sys.executable, "launch/train.py", "--data", "sample", "--output_dir", str(tmp_path / "run")]
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 6 and f"{package} {version}, but >=" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= MAX_LINES and "Model:" not in result.stdout
    assert not (tmp_path / "run").exists()
    tried(KIND, "refused before training")
