"""Surrogates: what the loss maximises at each token, made of its ratio and its advantage.

One function for each; `choose_surrogate` picks by loss type. docs/losses.md has the formulas side by side.
B completions, C tokens in the longest; W = C, or C + n with labels (expected_reward.py).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_ds.core.objective import LossType, Objective, unknown_name

MIN_LOG_WEIGHT, MAX_LOG_WEIGHT = math.log(1e-8), 20.0  # of a sequence under vespo; TRL's values


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Surrogate of every token, masked ones included, and masks of the clipped tokens.

    Example: ratios 1.5 and 0.5 of a completion with advantage 1; only the first is clipped.
        >>> surrogate = clipped_surrogate(torch.tensor([[1.5, 0.5]]), torch.ones(1, 1), epsilon=0.2, epsilon_high=0.2)
        >>> surrogate.values, surrogate.high
        (tensor([[1.2000, 0.5000]]), tensor([[ True, False]]))
    """

    values: Float[Tensor, "B C"]
    low: Bool[Tensor, "B C"]  # clipped at the lower bound
    high: Bool[Tensor, "B C"]  # clipped at the upper bound
    beyond_delta: Bool[Tensor, "B C"]  # clipped at delta


def clipped_surrogate(
    ratio: Float[Tensor, "B C"],
    advantages: Float[Tensor, "B _"],
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Surrogate:
    """PPO's clipped surrogate, min(ratio A, clip(ratio) A) (DeepSeekMath eq. 3); with delta, two-sided clipping.

    A clipped token has no gradient. Without delta, a token of negative advantage whose ratio has grown is not clipped.

    ratio: policy / old, of the token or of its sequence.
    advantages: A of each token, or one column: the same for all tokens of a completion.
    epsilon: the clip's lower bound is 1 - epsilon.
    epsilon_high: the clip's upper bound is 1 + epsilon_high (more than epsilon: DAPO's clip-higher, eq. 10).
    delta: bound of the unclipped ratio, which matters if A < 0: min(min(ratio, delta) A, clip(ratio) A)
        (INTELLECT-2, two-sided clipping). More than 1 + epsilon_high; None: no bound.
    """
    lower_bound, upper_bound = 1 - epsilon, 1 + epsilon_high
    unclipped = ratio.clamp(max=delta) * advantages if delta else ratio * advantages
    return Surrogate(
        values=torch.minimum(unclipped, ratio.clamp(lower_bound, upper_bound) * advantages),
        low=(ratio < lower_bound) & (advantages < 0),
        high=(ratio > upper_bound) & (advantages > 0),
        beyond_delta=(ratio > (delta or torch.inf)) & (advantages < 0),
    )


def cispo_surrogate(
    ratio: Float[Tensor, "B C"],
    advantages: Float[Tensor, "B _"],
    policy_logprobs: Float[Tensor, "B C"],
    *,
    epsilon_high: float,
) -> Surrogate:
    """CISPO's surrogate, min(ratio, 1 + epsilon_high) A log policy, with the clipped ratio as a constant factor.

    The gradient flows only through log policy, so a clipped token keeps a bounded gradient (MiniMax-M1, 2025, eq. 4
    and 5, without a lower bound).

    ratio: policy / old of the token.
    advantages: A, as in `clipped_surrogate`.
    policy_logprobs: log policy, nats.
    epsilon_high: the clip's upper bound is 1 + epsilon_high.
    """
    upper_bound = 1 + epsilon_high
    high = ratio > upper_bound
    never = torch.zeros_like(high)
    values = ratio.detach().clamp(max=upper_bound) * advantages * policy_logprobs
    return Surrogate(values, low=never, high=high, beyond_delta=never)


def sapo_surrogate(
    ratio: Float[Tensor, "B W"],
    advantages: Float[Tensor, "B _"],
    *,
    temperature_pos: float,
    temperature_neg: float,
) -> Surrogate:
    """SAPO's surrogate, 4 / t sigmoid(t (ratio - 1)) A: a gate that closes smoothly where others clip.

    Its slope in the ratio is A at 1 and falls to both sides (SAPO, Gao et al. 2025, eq. 5 and 6).

    ratio, advantages: as in `clipped_surrogate`.
    temperature_pos: t where A > 0. temperature_neg: t elsewhere; a larger one closes the gate sooner.
    """
    temperature = torch.where(advantages > 0, temperature_pos, temperature_neg)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    values = 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages
    return Surrogate(values, low=never, high=never, beyond_delta=never)


def vespo_surrogate(
    ratio: Float[Tensor, "B W"],
    advantages: Float[Tensor, "B _"],
    policy_logprobs: Float[Tensor, "B W"],
    counted: Bool[Tensor, "B C"],
    *,
    pos: tuple[float, float],
    neg: tuple[float, float],
) -> Surrogate:
    """VESPO's surrogate, phi(w) A log policy, with phi(w) = w^k e^(lambda (1 - w)) as a constant factor.

    w is the ratio of the sequence, the product of its tokens' (VESPO, 2026; TRL's `get_gamma_weights`). phi(1) is 1;
    it falls smoothly where w is far from 1.

    ratio: of the token. advantages: as in `clipped_surrogate`. policy_logprobs: log policy, nats.
    pos: k and lambda where A >= 0. neg: elsewhere.
    """
    own = ratio[:, : counted.shape[1]].detach().log().where(counted, 0)
    log_weight = own.sum(dim=1, keepdim=True).clamp(MIN_LOG_WEIGHT, MAX_LOG_WEIGHT)
    power, decay = (torch.where(advantages >= 0, *pair) for pair in zip(pos, neg, strict=True))
    phi = (power * log_weight + decay * (1 - log_weight.exp())).exp()
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(phi * advantages * policy_logprobs, low=never, high=never, beyond_delta=never)


def choose_surrogate(
    ratio: Float[Tensor, "B W"],
    advantages: Float[Tensor, "B _"],
    policy_logprobs: Float[Tensor, "B W"],
    counted: Bool[Tensor, "B C"],
    objective: Objective,
) -> Surrogate:
    """Compute the surrogate of the objective's loss type; arguments as in the surrogates above."""
    kind, epsilon, epsilon_high = objective.loss_type, objective.epsilon, objective.epsilon_high
    if kind == "cispo":
        return cispo_surrogate(ratio, advantages, policy_logprobs, epsilon_high=epsilon_high)
    if kind == "sapo":
        temperatures = {
            "temperature_pos": objective.sapo_temperature_pos,
            "temperature_neg": objective.sapo_temperature_neg,
        }
        return sapo_surrogate(ratio, advantages, **temperatures)
    if kind == "vespo":
        pos = objective.vespo_k_pos, objective.vespo_lambda_pos
        neg = objective.vespo_k_neg, objective.vespo_lambda_neg
        return vespo_surrogate(ratio, advantages, policy_logprobs, counted, pos=pos, neg=neg)
    if kind in ("grpo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo"):
        return clipped_surrogate(ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=objective.delta)
    raise unknown_name("loss_type", kind, LossType)
