"""--answer_reward expected in the complete trainer, on a tiny model that has been taught to write the form."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_ds.errors import UsageError
from grpo_ds.report.console import Console
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.task.questions import read_questions
from grpo_ds.task.rewards import ready_made
from grpo_ds.training.trainer import Trainer
from tests.tiny import FORM
from tests.training.test_training import ROOT

QUESTIONS = read_questions("sample").questions


def make_trainer(folder, **changes):
    config = TrainConfig(
        model=str(folder), num_generations=4, batch_size=2, num_steps=3, learning_rate=1e-3, beta=0.04, **FORM
    )
    config = replace(config, **{"answer_reward": "expected", **changes})
    sizes = DsSizes(config.learning_rate, 0.0, 1.0, 0, 3, 8, 1, native="fp32")
    ds = resolve_ds_config(ROOT / "ds_configs/zero2.json", fill=sizes)
    rewards = ready_made(answer_format=config.answer_format, format_reward=config.format_reward)
    functions = {
        name: (rewards[name], 0.5 if name == "correctness" else 1.0) for name in config.reward_funcs.split(",")
    }
    return Trainer(config, ds, ranks.start(), Console(speaks=False), functions)


@pytest.fixture
def stepped(formed_folder):
    """A function that takes the first step and returns its metrics, its rollout, and the model after it."""
    trainers = []

    def step(questions=QUESTIONS, **changes):
        trainer = make_trainer(formed_folder, **changes)
        trainers.append(trainer)
        seen, make = [], trainer.make_rollout
        trainer.make_rollout = lambda groups: seen.append(make(groups)) or seen[-1]
        metrics = trainer.step(0, questions)
        return metrics, seen[0], trainer.engine.model

    yield step
    for trainer in trainers:
        trainer.engine.close()


def asked(model, rollout, b, tokenizer, size=4, text=None):
    """The oracle: probabilities of y and n after the completion's text up to its answer tag, by a forward pass."""
    prompt, text = rollout.prompts[b // size].tolist(), text or rollout.texts[b]
    start = tokenizer.encode(text[: text.index("<a>") + 3])
    logits = model(torch.tensor([prompt + start])).logits[0, -1]
    return logits[tokenizer.encode("yn")].softmax(dim=0)


def test_a_completion_in_form_earns_the_probability_of_the_right_label(stepped, formed_folder, tokenizer):
    metrics, rollout, _ = stepped()
    model, format_, placed = AutoModelForCausalLM.from_pretrained(formed_folder), TrainConfig(**FORM).answer_format, 0
    for b, text in enumerate(rollout.texts):
        label, earned = rollout.questions[b // 4].label, rollout.rewards.by_name["correctness"][b]
        answer = format_.parse(text).answer
        if answer is None:
            assert earned == 0
            continue
        q = asked(model, rollout, b, tokenizer)[("yes", "no").index(label)]
        assert earned == pytest.approx(2.0 * 0.5 * float(q.detach()), abs=1e-3)
        placed += 1
    assert placed >= 4 and metrics["expected_answers"] == placed / 8
    right = sum(it for it in rollout.rewards.by_name["correctness"])
    assert metrics["rewards/correctness/mean"] == pytest.approx(right / 8)
    assert metrics["p_right"] == pytest.approx(right / placed)
    assert metrics["lean/yes"] + metrics["lean/no"] == pytest.approx(1)
    assert 0 <= metrics["reasoning_share"] < 0.2  # its thoughts hardly change its answers


def test_reasoning_is_paid_by_what_it_adds_to_the_probability_of_the_right_label(stepped, formed_folder, tokenizer):
    metrics, rollout, _ = stepped(reward_funcs="format,reasoning_gain", answer_reward="sampled")
    model, earned = AutoModelForCausalLM.from_pretrained(formed_folder), rollout.rewards.by_name["reasoning_gain"]
    placed = rollout.labels.placed.tolist()
    assert sum(placed) >= 4 and [gain is not None for gain in earned] == placed
    for b in (b for b, known in enumerate(placed) if known):
        right = int(rollout.labels.right[b])
        own, empty = (asked(model, rollout, b, tokenizer, text=text)[right] for text in (None, "<r></r><a>"))
        assert earned[b] == pytest.approx(float((own - empty).detach()), abs=1e-3)
    assert metrics["rewards/reasoning_gain/mean"] == pytest.approx(sum(it or 0 for it in earned) / sum(placed))


def test_the_drawn_reward_and_its_metrics_are_as_before(stepped):
    metrics, rollout, _ = stepped(answer_reward="sampled")
    assert set(rollout.rewards.by_name["correctness"]) <= {0.0, 1.0} and rollout.of_labels is None
    assert "expected_answers" not in metrics and 0 < metrics["p_right"] < 1
    assert metrics["rewards/correctness/mean"] == metrics["accuracy"]


@pytest.mark.parametrize(
    "changes", [{"mu": 2}, {"scale_rewards": "batch"}, {"dynamic_sampling": 2}, {"beta": 0.0}], ids=str
)
def test_a_step_raises_the_probabilities_of_the_right_labels(stepped, changes, tokenizer):
    # All have one label: a model this small cannot tell questions apart.
    questions = [question for question in QUESTIONS if question.label == "yes"]
    _, rollout, model = stepped(questions, num_generations=8, format_reward=0.0, **changes)
    placed, before = rollout.labels.placed.nonzero().flatten().tolist(), rollout.labels.p_right
    assert len(placed) >= 8
    right = rollout.labels.right.tolist()
    after = [float(asked(model.eval(), rollout, b, tokenizer, 8)[right[b]].detach()) for b in placed]
    assert sum(after) / len(placed) > float(before[placed].mean()) + 0.005


def test_labels_that_begin_alike_are_refused_before_a_model_is_loaded(formed_folder, monkeypatch):
    monkeypatch.setattr(Trainer, "make_engine", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(UsageError, match="--answer_reward sampled"):
        make_trainer(formed_folder, labels="yes,yellow")
