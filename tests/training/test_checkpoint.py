"""A trainer's state in a checkpoint: another trainer takes it over, and older files are still read."""

import random
from pathlib import Path

import pytest
import torch

from grpo_ds.core.tally import Tally
from grpo_ds.training.checkpoint import _rank_state, _read_rank_state, _set_random_states, rank_file
from grpo_ds.training.rollout import PartialStep
from tests.training.layouts import rollout_of
from tests.training.test_training import tiny_trainer

CPU = torch.device("cpu")


@pytest.fixture
def partial_step():
    tally = Tally()
    tally.add("kl", 3.0, 4)
    tally.add("clip_ratio/low_mean", 1.0, 4)
    rollout = rollout_of()
    return PartialStep(rollout, redrawn=1, updates=1, old_logprobs=torch.rand(rollout.counted.shape), tally=tally)


def assert_same_step(one, two):
    assert (one.updates, one.redrawn, one.tally.as_pairs()) == (two.updates, two.redrawn, two.tally.as_pairs())
    assert torch.equal(one.old_logprobs, two.old_logprobs)
    assert one.rollout.texts == two.rollout.texts and one.rollout.rewards.total == two.rollout.rewards.total
    assert [question.id for question in one.rollout.questions] == [question.id for question in two.rollout.questions]
    for name in ("advantages", "counted", "ref_logprobs"):
        assert torch.equal(getattr(one.rollout, name), getattr(two.rollout, name)), name


def test_a_rank_file_holds_the_partial_step_and_the_random_states(partial_step, tmp_path):
    file = rank_file(tmp_path, 0)
    state = _rank_state(partial_step)
    drawn = random.random(), torch.rand(1)
    torch.save(state, file)
    read, states = _read_rank_state(file, CPU)
    _set_random_states(states)
    assert (random.random(), torch.rand(1)) == drawn
    assert_same_step(read, partial_step)


def test_a_rank_file_of_an_older_version_is_read_under_the_new_names(partial_step, tmp_path):
    state = _rank_state(partial_step)
    state["in_hand"] = state.pop("partial_step")
    state["in_hand"]["tally"]["clip_ratio/low"] = state["in_hand"]["tally"].pop("clip_ratio/low_mean")
    torch.save(state, rank_file(tmp_path, 0))
    assert_same_step(_read_rank_state(rank_file(tmp_path, 0), CPU)[0], partial_step)


def test_a_trainer_takes_over_the_state_of_another(tiny_folder, partial_step):
    one, questions, _ = tiny_trainer(tiny_folder, num_steps=2, oom_retry=True, max_completion_length=4)
    one.refresh_reference(0, questions)
    one.step(0, questions)
    one.shrink("sample")
    one.bad_steps.in_a_row = [0]
    one.partial_step = partial_step
    state = one.state_dict()
    two, _, _ = tiny_trainer(tiny_folder, num_steps=3, max_completion_length=4)
    assert two.reference is None
    two.load_state_dict({**state, "run": Path()})
    assert (two.progress.global_step, two.progress.reference_step) == (1, 0) and two.progress.max_steps == 3
    assert two.progress.num_input_tokens_seen == one.progress.num_input_tokens_seen > 0
    assert two.partial_step is partial_step and two.bad_steps.in_a_row == [0]
    assert two.limits.rows == one.limits.rows == two.sampler.rows_at_once < 16
    again = two.state_dict()
    assert again["progress"].limits == state["progress"].limits == {"rows": one.limits.rows}
    assert all(torch.equal(again["reference"][name], weight) for name, weight in state["reference"].items())
    one.engine.close(), two.engine.close()
