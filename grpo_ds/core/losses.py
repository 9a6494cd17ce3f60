"""The loss as a weighted sum over tokens, and the one ratio that every objective clips in its own way.

What a token weighs is fixed once per optimizer step, before the batch is split: the loss is then a
plain sum and comes out the same for any micro-batches and any number of ranks (bnpo aside, which is
the mean over micro-batches by definition).

Sources: DeepSeekMath (Shao et al. 2024), equations 3 (surrogate) and 4 (k3), unless a function names another.
docs/losses.md has all formulas side by side. B completions, C tokens in the longest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_ds.core.objective import KlEstimator, LossType, Objective

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: past it exp only overflows, and no optimizer step should follow it


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss, and per token what it was made of; 0 and False where a token does not count."""

    loss: Float[Tensor, ""]
    kl: Float[Tensor, "B C"]  # the estimate that the loss uses; 0 when beta is 0
    low: Bool[Tensor, "B C"]  # clipped at 1 - epsilon: the surrogate has no gradient here
    high: Bool[Tensor, "B C"]  # clipped at 1 + epsilon_high: no gradient; under cispo a bounded one
    clipped: Bool[Tensor, "B C"]  # low, high, or beyond delta


def token_weights(
    mask: Bool[Tensor, "B C"], *, loss_type: LossType, sequences: int, tokens: int, max_completion_length: int
) -> Float[Tensor, "B C"]:
    """Each counted token's share of the step's loss; other tokens weigh 0.

    grpo, gspo: each sequence weighs 1 / sequences, shared evenly by its tokens (DeepSeekMath eq. 3, GSPO eq. 5).
    dapo, cispo, bnpo: each token weighs 1 / tokens (DAPO eq. 8, MiniMax-M1 eq. 4).
    dr_grpo: each token weighs 1 / (sequences * max_completion_length) (Liu et al. 2025, section 3.2).

    sequences, tokens: counted ones of the whole optimizer step, over all micro-batches and ranks; for bnpo `tokens`
    is those of this micro-batch times the number of micro-batches.
    """
    if loss_type in ("grpo", "gspo"):
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        return mask / (lengths * max(sequences, 1))
    if loss_type == "dr_grpo":
        return mask / (max(sequences, 1) * max_completion_length)
    return mask / max(tokens, 1)


def importance_ratio(
    policy_logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    counted: Bool[Tensor, "B C"],
    *,
    loss_type: LossType,
) -> Float[Tensor, "B C"]:
    """policy / old by token; under gspo its geometric mean over a sequence, at each of its tokens (GSPO eq. 7)."""
    log_ratio = policy_logprobs - old_logprobs
    if loss_type == "gspo":
        lengths = counted.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.where(counted, 0).sum(dim=1, keepdim=True) / lengths).expand_as(log_ratio)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_k3(policy_logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """e^d - d - 1 with d = ref - policy: never negative, exact to first order at d = 0 (eq. 4)."""
    d = (ref_logprobs - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d


def kl_estimate(
    policy_logprobs: Float[Tensor, "B C"],
    ref_logprobs: Float[Tensor, "B C"],
    ratio: Float[Tensor, "B C"],
    *,
    estimator: KlEstimator,
) -> Float[Tensor, "B C"]:
    """KL(policy || ref) by token, by Schulman's names; with d = ref - policy: k1 = -d, k2 = d^2 / 2, k3 as above.

    As losses on fresh samples they differ by their gradient: that of k1 is 0 on average, that of k2 belongs to
    KL(policy || ref), that of k3 to KL(ref || policy); k3_corrected is k3 times the ratio, whose own gradient
    makes it KL(policy || ref) again (DeepSeek-V3.2, section 3.1).
    """
    if estimator == "k1":
        return policy_logprobs - ref_logprobs
    if estimator == "k2":
        return (policy_logprobs - ref_logprobs).square() / 2
    k3 = kl_k3(policy_logprobs, ref_logprobs)
    return k3 * ratio if estimator == "k3_corrected" else k3


def grpo_loss(
    policy_logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    ref_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    weights: Float[Tensor, "B C"],
    objective: Objective,
) -> LossTerms:
    """Sum of weights * (beta * KL - surrogate).

    The surrogate is min(ratio A, clip(ratio) A), of which delta bounds the free branch (INTELLECT-2, two-sided
    clipping); under cispo the clipped ratio is a constant factor of A log policy, so that no token loses its
    gradient (MiniMax-M1, eq. 4).
    Masked tokens must have weight 0 and finite log-probs (0 will do). With beta 0 the reference's values are not
    looked at.
    """
    advantage, counted = advantages[:, None], weights > 0
    ratio = importance_ratio(policy_logprobs, old_logprobs, counted, loss_type=objective.loss_type)
    floor, ceiling = 1 - objective.epsilon, 1 + objective.epsilon_high
    if objective.loss_type == "cispo":
        surrogate = ratio.detach().clamp(max=ceiling) * advantage * policy_logprobs
        low, high = torch.zeros_like(counted), ratio > ceiling
        beyond = low
    else:
        free = ratio.clamp(max=objective.delta) * advantage if objective.delta else ratio * advantage
        surrogate = torch.minimum(free, ratio.clamp(floor, ceiling) * advantage)
        low, high = (ratio < floor) & (advantage < 0), (ratio > ceiling) & (advantage > 0)
        beyond = (ratio > (objective.delta or torch.inf)) & (advantage < 0)
    kl = torch.zeros_like(policy_logprobs)
    if objective.beta:
        kl = kl_estimate(policy_logprobs, ref_logprobs, ratio, estimator=objective.kl_estimator)
    loss = (weights * (objective.beta * kl - surrogate)).sum()
    low, high, beyond = low & counted, high & counted, beyond & counted
    return LossTerms(loss, (kl * counted).detach(), low, high, low | high | beyond)
