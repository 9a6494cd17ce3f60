"""Settings of the objective that a run maximises, and their allowed names.

Standard library only: the command line reads the names before anything heavy is loaded.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

LossType = Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo"]
KlEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
RewardScale = Literal["group", "batch", "none"]
RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]
AnswerReward = Literal["auto", "sampled", "expected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Settings of the loss; docs/losses.md has the formulas.

    Example: DAPO, which clips higher and has no reference.
        >>> Objective(loss_type="dapo", epsilon_high=0.28, beta=0.0, max_completion_length=300).epsilon
        0.2
    """

    loss_type: LossType = "grpo"
    epsilon: float = 0.2  # the ratio is clipped at 1 - epsilon ...
    epsilon_high: float = 0.2  # ... and at 1 + epsilon_high
    delta: float | None = None  # bound of the unclipped ratio if the advantage is negative; None: no bound
    sapo_temperature_pos: float = 1.0  # of sapo's gate if the advantage is positive ...
    sapo_temperature_neg: float = 1.05  # ... and if it is not
    vespo_k_pos: float = 2.0  # power and decay of vespo's weight if the advantage is not negative ...
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0  # ... and if it is
    vespo_lambda_neg: float = 2.0
    beta: float = 0.04  # weight of the KL to the reference; 0: no reference is needed
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0  # weight of the mean entropy, which the loss subtracts
    top_entropy_quantile: float = 1.0  # share of the tokens, by entropy, that the surrogate and the bonus keep
    max_completion_length: int  # tokens; the divisor of dr_grpo


def unknown_name(setting: str, name: object, names: Any) -> ValueError:
    """Return the error for a name that is not in the Literal `names`."""
    return ValueError(f"{setting} is {name!r}; it must be one of {', '.join(get_args(names))}.")
