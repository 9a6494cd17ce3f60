"""An interrupted and resumed run has the metrics and weights of an uninterrupted one, bit by bit."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_ds.errors import CheckpointError
from grpo_ds.models.chat_texts import CHAT_TEXTS_FILE
from grpo_ds.report.console import Console
from grpo_ds.run_folder.checkpoints import found_in
from grpo_ds.run_folder.resume import to_resume
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.system.signals import Interrupted
from grpo_ds.task.grading import graded
from grpo_ds.task.questions import read_questions, split_questions
from grpo_ds.task.rewards import ready_made
from grpo_ds.training.checkpoint import load_checkpoint
from grpo_ds.training.run import Run
from grpo_ds.training.trainer import Trainer
from tests.conftest import CHATML, DATED, Clock
from tests.tiny import FORM
from tests.training.test_training import ROOT

CONFIG = TrainConfig(
    num_generations=3, batch_size=2, num_steps=2, num_iterations=2, mu=2, max_completion_length=6,
    max_prompt_length=480, learning_rate=5e-3, beta=0.1, eval_limit=2, save_steps=0,
)  # fmt: skip
LOWRAM, LOWRAM7, ON_CARD, SGD = (f"ds_configs/zero2_{name}.json" for name in ("lowram", "lowram7", "gpu", "sgd"))
# Kinds of runs: (changed flags, DeepSpeed JSON, in bf16)
KINDS = {
    "offload, int8 reference": ({}, "ds_configs/zero2.json", False),
    "offload in bf16": ({}, "ds_configs/zero2.json", True),
    "bf16 masters": ({}, LOWRAM, True),
    "masters of 24 bits": ({}, LOWRAM7, True),
    "SGD": ({"learning_rate": 0.5}, SGD, True),
    "no offload": ({}, ON_CARD, False),
    "LoRA": ({"lora_r": 4, "lora_alpha": 8}, "ds_configs/zero2.json", False),
    "bf16 reference, mixed": (
        {"reference": "bf16", "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        "ds_configs/zero2.json",
        False,
    ),
    "streamed reference": ({"reference": "streamed"}, "ds_configs/zero2.json", False),
    "streamed reference in bf16": ({"reference": "streamed"}, LOWRAM, True),
    "llm.int8 reference": ({"reference": "llm.int8"}, "ds_configs/zero2.json", False),
    "no reference, dynamic sampling": ({"beta": 0.0, "dynamic_sampling": 2, "mu": 3}, "ds_configs/zero2.json", False),
    "evaluated on the way": ({"eval_steps": 1}, "ds_configs/zero2.json", False),
    "expected answers": (
        {"answer_reward": "expected", "dynamic_sampling": 1, "learning_rate": 5e-4, **FORM},
        "ds_configs/zero2.json",
        False,
    ),
}


def uneven(completions, **_):
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


def make_run(model: Path, kind: str, folder: Path, origin: Path | None = None) -> Run:
    """Build the run as launch/train.py does."""
    changes, json_file, bf16 = KINDS[kind]
    config = replace(CONFIG, model=str(model), **changes)
    size = config.batch_size * config.num_generations
    sizes = DsSizes(config.learning_rate, 0.0, 1.0, 0, 8, size, 1, native="bf16" if bf16 else "fp32")
    ds = resolve_ds_config(ROOT / json_file, fill=sizes)
    train, held_out = split_questions(read_questions("sample").questions, eval_fraction=0.2, seed=0)
    rewards = {"uneven": (uneven, 1.0)}
    if config.answer_reward == "expected":
        rewards["correctness"] = ready_made(answer_format=config.answer_format)["correctness"], 1.0
    trainer = Trainer(config, ds, ranks.start(), Console(speaks=False), rewards, origin=origin)
    if origin:
        load_checkpoint(trainer, origin)
    return Run(trainer, train, held_out[:2], folder)


def finish(run: Run) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Finish a run; return its metrics without clocks and memory, and its weights and masters."""
    run.run()
    state = {name: weight.detach().clone() for name, weight in run.trainer.engine.policy.named_parameters()}
    optimizer = run.trainer.engine._engine.optimizer
    state |= {f"master {i}": m.detach().clone() for i, m in enumerate(optimizer.single_partition_of_fp32_groups)}
    run.trainer.engine.close()
    clocks = ("seconds/", "memory/", "tokens_per_second", "step_time")
    lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in run.progress.log_history]
    return lines, state


def stop_at(run: Run, when: int | None = None) -> Interrupted | None:
    """Run until the `when`-th safe point and send a stop signal there; None if the run ends before.

    when: None stands for the first safe point between two updates on a rollout.
    """
    passed, check = 0, run.trainer.interruption.check

    def counting() -> None:
        nonlocal passed
        passed += 1
        partial_step = run.trainer.partial_step
        if passed == when or (when is None and partial_step and partial_step.updates):
            run.trainer.interruption.signum = signal.SIGTERM
        check()

    run.trainer.interruption.check = counting
    try:
        run.run()
    except Interrupted as stopped:
        return stopped
    finally:
        run.trainer.engine.close()
    return None


@pytest.fixture(scope="module", params=KINDS)
def straight(request, tmp_path_factory):
    """A kind of run, its model, its result without interruption, and its number of safe points."""
    folder = tmp_path_factory.mktemp("straight")
    expects = KINDS[request.param][0].get("answer_reward") == "expected"
    model = request.getfixturevalue("formed_folder" if expects else "tiny_folder")
    run = make_run(model, request.param, folder / "run")
    points, check = 0, run.trainer.interruption.check

    def counting() -> None:
        nonlocal points
        points += 1
        check()

    run.trainer.interruption.check = counting
    metrics, weights = finish(run)
    assert not expects or min(line["expected_answers"] for line in metrics if "reward" in line) > 0
    return request.param, model, metrics, weights, points


def test_interrupted_anywhere_and_resumed_it_is_the_same_run(straight, tmp_path):
    kind, model, metrics, weights, points = straight
    # Before training, while sampling, between the updates on a rollout, between steps, between iterations.
    # tests/faults/test_interrupted.py tries many more of these points.
    for when in (points // 3, None, points * 3 // 4):
        folder = tmp_path / str(when)
        stopped = stop_at(make_run(model, kind, folder), when)
        assert stopped is not None and stopped.exit_code == 75
        origin, warnings = to_resume("auto", folder)
        assert not warnings
        again, state = finish(make_run(model, kind, folder, origin))
        assert again == metrics, f"interrupted at safe point {when} of {points}"
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())
        assert len(found_in(folder)) == 1


def test_a_checkpoint_is_a_model_folder_and_the_best_one_is_kept(tiny_folder, tmp_path, monkeypatch):
    changes = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    monkeypatch.setitem(KINDS, "kept", (changes, "ds_configs/zero2.json", False))
    run = make_run(tiny_folder, "kept", tmp_path / "run")
    answers = iter([None, "no", None, None, None])  # before, after each step but the last, at the end

    def planted(when, questions, briefly=False):
        texts = [
            f"<reasoning>r</reasoning>\n<answer>{answer}</answer>" if answer else "" for answer in [next(answers)] * 2
        ]
        return graded(
            texts, [replace(question, label="no") for question in questions], run.trainer.config.answer_format
        )

    monkeypatch.setattr(run.trainer, "evaluate", planted)
    metrics, state = finish(run)
    accuracies = [(line["step"], line["eval/accuracy"]) for line in metrics if "eval/accuracy" in line]
    assert accuracies == [(1, 1.0), (2, 0.0), (3, 0.0)] and len(run.progress.rewards) == 4
    assert run.progress.best_global_step == 1
    assert [folder.name for folder in found_in(tmp_path / "run")] == ["checkpoint-4", "checkpoint-1"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4", dtype=torch.float32)
    weights = {f"model.{name}": weight for name, weight in saved.named_parameters()}
    assert all(torch.equal(weight, state[name]) for name, weight in weights.items())


def test_a_run_resumed_on_another_day_has_the_prompts_of_the_first(tiny_folder, tmp_path, days_pass):
    """The template prints the date; while the run rests, its model's template and tokenizer change as well."""
    kind = "no reference, dynamic sampling"
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    first_day = Clock.day
    metrics, weights = finish(make_run(model, kind, tmp_path / "straight"))
    Clock.day = first_day
    assert stop_at(make_run(model, kind, tmp_path / "run")) is not None
    (model / "chat_template.jinja").write_text("Edited. {{ strftime_now('%A') }}" + CHATML)
    origin, _ = to_resume("auto", tmp_path / "run")
    again, state = finish(make_run(model, kind, tmp_path / "run", origin))
    assert again == metrics and all(torch.equal(state[name], weight) for name, weight in weights.items())
    first, resumed = (json.loads((tmp_path / name / CHAT_TEXTS_FILE).read_text()) for name in ("straight", "run"))
    assert resumed == first and any(text.startswith("Today is ") for text in first.values())


def test_a_resumed_run_whose_prompts_would_differ_is_refused(tiny_folder, tmp_path, days_pass):
    kind = "no reference, dynamic sampling"
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    assert stop_at(make_run(model, kind, tmp_path / "run")) is not None
    (checkpoint,) = found_in(tmp_path / "run")
    (checkpoint / CHAT_TEXTS_FILE).unlink()
    run = make_run(model, kind, tmp_path / "run", checkpoint)
    with pytest.raises(CheckpointError, match="the token ids of the prompts changed"):
        run.run()
    run.trainer.engine.close()
