"""Advantages and the overlong penalty against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_ds.core import advantages
from grpo_ds.core.advantages import group_advantages, overlong
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


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0)],  # 100 tokens, the last 20 a buffer
)
def test_the_overlong_penalty_grows_through_the_buffer(length, penalty):
    value = overlong(torch.tensor([length]), max_length=100, buffer=20)
    torch.testing.assert_close(value, torch.tensor([penalty]))
