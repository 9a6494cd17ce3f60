"""Group-relative advantages: how much better a completion is than the others of its group.

B completions in groups of G consecutive rows; the rows of a group answer one question.
"""

from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_ds.core.objective import RewardScale

EPS = 1e-4  # added to a standard deviation, so that nearly equal rewards do not give huge advantages; TRL's value


def group_advantages(
    rewards: Float[Tensor, " B"],
    *,
    group_size: int,
    scale: RewardScale = "group",
    step_rewards: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " B"]:
    """Centre each reward on its group and scale it: (reward - mean) / (std + EPS); exactly 0 if all are equal.

    scale, step_rewards: as in `reward_spread`.
    """
    spread = reward_spread(rewards, group_size=group_size, scale=scale, step_rewards=step_rewards)
    return centred(rewards, group_size=group_size) / spread


def decoupled_sum(
    rewards: Float[Tensor, "B R"], weights: Float[Tensor, " R"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Standardise each of R rewards within its group, then sum them by weight: GDPO (Liu et al. 2026, eq. 4 and 5).

    A sum of rewards has few values that differ (1 + 0 is 0 + 1), and so few advantages; these are told apart.
    0 for a completion whose rewards are those of its group; divide by their deviation in the step.

    rewards: weights applied; NaN where a function does not apply, which counts neither for a mean nor in the sum.
    weights: of the rewards. Their signs are in `rewards`, and |w| (r - mean) / (std + |w| EPS) is what w r gives there.
    """
    groups = rewards.view(-1, group_size, rewards.shape[1])  # [Q, G, R]
    count = (~groups.isnan()).sum(dim=1, keepdim=True)
    mean = groups.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    largest = groups.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    equal = (groups.isnan() | (groups == largest)).all(dim=1, keepdim=True)  # a mean is rounded: as in `centred`
    off = (groups - mean).masked_fill(equal | groups.isnan(), 0)
    std = (off.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    size = weights.abs()
    return (size * off / (std + size * EPS).masked_fill(equal, 1)).sum(dim=2).flatten()


def step_spread(sums: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return the number by which GDPO divides: the deviation of `decoupled_sum` over the step's completions, plus EPS.

    sums: of the completions of all ranks that any function scored. Their mean is 0, as each group's is.
    """
    return (sums.std() if len(sums) > 1 else sums.new_zeros(())) + EPS


def centred(rewards: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Subtract from each reward the mean of its group; exactly 0 if all are equal."""
    groups = rewards.view(-1, group_size)  # [Q, G]
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    # A mean is rounded: without this, equal rewards of 2.4 leave 1e-7, and the division by EPS gives 1e-3.
    return (groups - groups.mean(dim=1, keepdim=True)).masked_fill(equal, 0).flatten()


def reward_spread(
    rewards: Float[Tensor, " B"],
    *,
    group_size: int,
    scale: RewardScale = "group",
    hidden_variance: Float[Tensor, " B"] | None = None,
    step_rewards: Float[Tensor, " N"] | None = None,
    step_hidden_variance: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " B"]:
    """Return the number by which the advantage of each completion is divided.

    scale: "group" divides by the standard deviation of the group (DeepSeekMath, Shao et al. 2024, section 4.1.2),
        "batch" by that of `step_rewards` (Liu et al. 2025, "Tricks or Traps"), "none" does not divide (Dr. GRPO,
        Liu et al. 2025, section 3.2).
    hidden_variance: variance of rewards that are expectations; None: 0. The deviation is then the one that drawn
        rewards would have: the law of total variance.
    step_rewards, step_hidden_variance: of this step on all ranks; None: of these completions.
    """
    if scale == "none":
        return torch.ones_like(rewards)
    if scale == "batch":
        if step_rewards is None:
            step_rewards, step_hidden_variance = rewards, hidden_variance
        return _std(step_rewards[None], step_hidden_variance).expand_as(rewards) + EPS
    if scale == "group":
        return (_std(rewards.view(-1, group_size), hidden_variance) + EPS).repeat_interleave(group_size)
    raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(RewardScale))}.")


def _std(rewards: Float[Tensor, "Q G"], hidden_variance: Float[Tensor, " N"] | None) -> Float[Tensor, " Q"]:
    """Standard deviation of each row."""
    if hidden_variance is None:
        return rewards.std(dim=1)
    return (rewards.var(dim=1) + hidden_variance.view_as(rewards).mean(dim=1)).sqrt()


def overlong(lengths: Int[Tensor, " B"], *, max_length: int, buffer: int) -> Float[Tensor, " B"]:
    """Overlong penalty: 0 up to max_length - buffer tokens, then linear to -1 at max_length (DAPO, Yu et al. 2025,
    eq. 13).

    lengths, max_length, buffer: tokens; buffer is from 1 to max_length.
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)
