"""Group-relative advantages: how much better a completion is than the others of its group.

B completions in groups of G consecutive rows; the rows of a group answer one question.
"""

from typing import get_args

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

    scale: "group" divides by the standard deviation of the group (DeepSeekMath, Shao et al. 2024, section 4.1.2),
        "batch" by that of `step_rewards` (Liu et al. 2025, "Tricks or Traps"), "none" does not divide (Dr. GRPO,
        Liu et al. 2025, section 3.2).
    step_rewards: rewards of this step on all ranks; None: `rewards`.
    """
    groups = rewards.view(-1, group_size)  # [Q, G]
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    # A mean is rounded: without this, equal rewards of 2.4 leave 1e-7, and the division by EPS gives 1e-3.
    centred = (groups - groups.mean(dim=1, keepdim=True)).masked_fill(equal, 0)
    if scale == "none":
        return centred.flatten()
    if scale == "batch":
        std = (rewards if step_rewards is None else step_rewards).std()
    elif scale == "group":
        std = groups.std(dim=1, keepdim=True)
    else:
        raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(RewardScale))}.")
    return (centred / (std + EPS)).flatten()


def overlong(lengths: Int[Tensor, " B"], *, max_length: int, buffer: int) -> Float[Tensor, " B"]:
    """Overlong penalty: 0 up to max_length - buffer tokens, then linear to -1 at max_length (DAPO, Yu et al. 2025,
    eq. 13).

    lengths, max_length, buffer: tokens; buffer is from 1 to max_length.
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)
