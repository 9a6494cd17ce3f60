"""Advantages and the overlong penalty against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_ds.core import advantages
from grpo_ds.core.advantages import decoupled_sum, group_advantages, overlong, step_spread
from tests.conftest import load_unchecked

REWARDS = torch.tensor([0.0, 2.0, 2.0, 4.0, 1.0, 1.0, 1.0, 3.0])


def test_a_group_is_standardised_by_its_own_mean_and_deviation():
    # group 1: mean 2, deviations -2 0 0 2, std sqrt(8/3); group 2: mean 1.5, std 1
    std = (8 / 3) ** 0.5 + 1e-4
    expected = torch.tensor([-2 / std, 0, 0, 2 / std, -0.5 / 1.0001, -0.5 / 1.0001, -0.5 / 1.0001, 1.5 / 1.0001])
    torch.testing.assert_close(group_advantages(REWARDS, group_size=4), expected)


@pytest.mark.parametrize(
    ("scale", "step_rewards", "std"),
    [
        ("none", None, 1.0),
        # mean 1.75; squares 3.0625 + 2 x 0.0625 + 5.0625 + 3 x 0.5625 + 1.5625 = 11.5, over 7
        ("batch", None, (11.5 / 7) ** 0.5 + 1e-4),
        ("batch", torch.tensor([0.0, 2.0]), 2**0.5 + 1e-4),  # the step's rewards on all ranks, not those of this rank
    ],
)
def test_rewards_are_centred_on_their_group_whatever_scales_them(scale, step_rewards, std):
    expected = torch.tensor([-2.0, 0, 0, 2, -0.5, -0.5, -0.5, 1.5]) / std
    scaled = group_advantages(REWARDS, group_size=4, scale=scale, step_rewards=step_rewards)
    torch.testing.assert_close(scaled, expected)


def test_an_unknown_scale_is_refused():
    unchecked = load_unchecked(advantages)
    with pytest.raises(ValueError, match=r"scale is 'std'; it must be one of group, batch, none\."):
        unchecked.group_advantages(REWARDS, group_size=4, scale="std")


@given(st.floats(-1e4, 1e4, width=32), st.integers(2, 16), st.sampled_from(["group", "batch", "none"]))
def test_a_group_whose_rewards_are_equal_has_no_advantage(reward, size, scale):
    rewards = torch.cat([torch.full((size,), reward), torch.arange(size)])
    assert torch.equal(group_advantages(rewards, group_size=size, scale=scale)[:size], torch.zeros(size))


def test_adding_a_constant_to_a_group_changes_nothing():
    rewards = torch.rand(8)
    shifted = rewards + torch.tensor([5.0] * 4 + [-3.0] * 4)
    torch.testing.assert_close(
        group_advantages(rewards, group_size=4), group_advantages(shifted, group_size=4), atol=1e-5, rtol=1e-5
    )


NAN = float("nan")
# Right and well-formed, right, well-formed, neither: two of each, so each has mean 1/2 and deviation sqrt(1/3).
TWO_REWARDS = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
Z = 0.5 / ((1 / 3) ** 0.5 + 1e-4)


def test_each_reward_is_standardised_before_they_are_summed_by_hand():
    # 100 times the first reward changes nothing but the part of EPS; its weight does: 3 Z where it is 1, -3 Z where 0
    sums = decoupled_sum(TWO_REWARDS * torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0]), group_size=4)
    torch.testing.assert_close(sums, torch.tensor([4 * Z, 2 * Z, -2 * Z, -4 * Z]))
    larger = decoupled_sum(TWO_REWARDS * torch.tensor([100.0, 1.0]), torch.ones(2), group_size=4)
    torch.testing.assert_close(larger, torch.tensor([2 * Z, 0, 0, -2 * Z]), atol=1e-3, rtol=0)  # EPS / 57


def test_a_negative_weight_turns_an_advantage_round_and_a_weight_of_0_leaves_none():
    sums = decoupled_sum(TWO_REWARDS * torch.tensor([-1.0, 0.0]), torch.tensor([-1.0, 0.0]), group_size=4)
    torch.testing.assert_close(sums, torch.tensor([-Z, -Z, Z, Z]))


def test_a_function_that_does_not_apply_counts_neither_in_the_mean_nor_in_the_sum():
    # the second: 1, none, 0, none: mean 1/2, deviation sqrt(1/2); the third applies once: no deviation, no advantage
    rewards = torch.tensor([[1.0, 1.0, NAN], [1.0, NAN, NAN], [0.0, 0.0, 5.0], [0.0, NAN, NAN]])
    own = 0.5 / (0.5**0.5 + 1e-4)
    sums = decoupled_sum(rewards, torch.ones(3), group_size=4)
    torch.testing.assert_close(sums, torch.tensor([Z + own, Z, -Z - own, -Z]))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2), st.integers(2, 16))
def test_a_group_whose_rewards_are_equal_by_name_has_no_advantage(rewards, size):
    values = torch.cat([torch.tensor([rewards]).expand(size, 2), torch.rand(size, 2)])
    assert torch.equal(decoupled_sum(values, torch.ones(2), group_size=size)[:size], torch.zeros(size))


def test_the_spread_of_a_step_is_a_deviation_and_that_of_one_completion_is_not_its_own():
    assert float(step_spread(torch.tensor([0.0, 2.0]))) == pytest.approx(2**0.5 + 1e-4)
    assert float(step_spread(torch.zeros(1))) == float(step_spread(torch.zeros(0))) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0)],  # 100 tokens, the last 20 a buffer
)
def test_the_overlong_penalty_grows_through_the_buffer(length, penalty):
    value = overlong(torch.tensor([length]), max_length=100, buffer=20)
    torch.testing.assert_close(value, torch.tensor([penalty]))
