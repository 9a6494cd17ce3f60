"""Group-relative advantages: how much better a completion did than its siblings.

B completions in groups of G consecutive rows; the rows of a group answer one question.
"""

from jaxtyping import Float
from torch import Tensor

EPS = 1e-4  # keeps a group of equal rewards at advantage 0 instead of 0/0; the value TRL uses


def group_advantages(rewards: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Standardise each reward within its group: (reward - mean) / (std + EPS).

    Source: DeepSeekMath (Shao et al. 2024), section 4.1.2, outcome supervision.
    """
    groups = rewards.view(-1, group_size)  # [Q, G]
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + EPS)).flatten()
