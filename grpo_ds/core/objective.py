"""Which objective a run maximises: its settings and the names they may take.

Standard library only: the command line reads the names before anything heavy is loaded.
"""

from dataclasses import dataclass
from typing import Literal

LossType = Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "cispo"]
KlEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
RewardScale = Literal["group", "batch", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Settings of the loss; docs/losses.md has the formulas."""

    loss_type: LossType = "grpo"
    epsilon: float = 0.2  # the ratio's lower bound is 1 - epsilon
    epsilon_high: float = 0.2  # and its upper bound 1 + epsilon_high
    delta: float | None = None  # bound of the ratio where the advantage is negative; None: none
    beta: float = 0.04  # weight of the KL to the reference; 0: the reference is not looked at
    kl_estimator: KlEstimator = "k3"
    max_completion_length: int  # tokens; the divisor of dr_grpo
