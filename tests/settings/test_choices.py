"""No choice falls through: what depends on a choice refuses one that it does not know, even if no check came before."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_origin

import pytest
import torch
from transformers import get_scheduler

from grpo_ds.core import advantages, losses
from grpo_ds.errors import RewardError
from grpo_ds.memory.choose import default_run
from grpo_ds.memory.plan import make_plan
from grpo_ds.models.lora import quantization
from grpo_ds.models.reference import make_reference
from grpo_ds.models.shapes import shape_of
from grpo_ds.report import trackers
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.flags import all_flags
from grpo_ds.settings.values import kind_of
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.own_rewards import own_reward
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import score
from grpo_ds.training.collect import expected_reward
from grpo_ds.training.rollout import advantages_of
from tests.conftest import load_unchecked

ZEROS, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


def weigh(choice):
    load_unchecked(losses).token_weights(MASK, loss_type=choice, sequences=2, tokens=6, max_completion_length=3)


def estimate(choice):
    load_unchecked(losses).kl_estimate(ZEROS, ZEROS, ZEROS, estimator=choice)


def standardise(choice):
    load_unchecked(advantages).group_advantages(torch.arange(2.0), group_size=2, scale=choice)


def plan(choice):
    config, ds = default_run()
    make_plan(shape_of("qwen2.5-0.5b"), replace(config, reference=choice), ds)


def reference(choice):
    make_reference(SimpleNamespace(model=None), choice, store=lambda: None)


def score_with_a_function_that_fails(choice):
    score(["a"], [Question("1", "Is it?", "", "yes")], functions={"f": (lambda **_: 1 / 0, 1.0)}, on_error=choice)


def track(choice):
    trackers._make(choice, Path(), {}, Progress(max_steps=1))


def aggregate(choice):
    advantages_of(None, None, "group", 0.0, aggregation=choice)


USES = {
    "loss_type": [weigh],
    "kl_estimator": [estimate],
    "scale_rewards": [standardise],
    "multi_objective_aggregation": [aggregate],
    "lr_scheduler_type": [lambda choice: get_scheduler(choice, None)],
    "answers": [lambda choice: AnswerFormat(kind=choice).wanted],
    "answer_reward": [lambda choice: expected_reward(TrainConfig(answer_reward=choice), {})],
    "reference": [plan, reference],
    "completion_format": [lambda choice: own_reward(lambda completions: [], (), choice)],
    "on_reward_error": [score_with_a_function_that_fails],
    "report_to": [track],
    "load_in_4bit": [lambda choice: quantization(choice, torch.float32)],
}


@pytest.mark.parametrize("choice", [None, "other"])
@pytest.mark.parametrize(("flag", "use"), [(flag, use) for flag, uses in USES.items() for use in uses])
def test_a_choice_that_nothing_knows_is_never_taken_for_another(flag, use, choice):
    with pytest.raises((ValueError, KeyError, RewardError)):
        use(choice)


def test_every_flag_with_choices_is_in_this_table():
    choices = {flag.name for flag in all_flags(TrainConfig) if get_origin(kind_of(flag)) is Literal}
    assert choices <= USES.keys(), "a new choice: add what depends on it to USES"
