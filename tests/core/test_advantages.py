"""Advantages against numbers worked out by hand."""

import torch

from grpo_ds.core.advantages import group_advantages


def test_a_group_is_standardised_by_its_own_mean_and_deviation():
    rewards = torch.tensor([0.0, 2.0, 2.0, 4.0, 1.0, 1.0, 1.0, 3.0])
    # group 1: mean 2, deviations -2 0 0 2, std sqrt(8/3); group 2: mean 1.5, std 1
    std = (8 / 3) ** 0.5 + 1e-4
    expected = torch.tensor([-2 / std, 0, 0, 2 / std, -0.5 / 1.0001, -0.5 / 1.0001, -0.5 / 1.0001, 1.5 / 1.0001])
    torch.testing.assert_close(group_advantages(rewards, group_size=4), expected)


def test_a_group_whose_rewards_are_equal_has_no_advantage():
    assert group_advantages(torch.full((6,), 2.4), group_size=3).abs().max() < 1e-3


def test_adding_a_constant_to_a_group_changes_nothing():
    rewards = torch.rand(8)
    shifted = rewards + torch.tensor([5.0] * 4 + [-3.0] * 4)
    torch.testing.assert_close(
        group_advantages(rewards, group_size=4), group_advantages(shifted, group_size=4), atol=1e-5, rtol=1e-5
    )
