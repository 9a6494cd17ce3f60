"""The GRPO loss: a weighted sum over tokens of beta * KL - surrogate.

surrogates.py has the surrogates.
`token_weights` fixes the weight of each token once per optimizer step, before the batch is split. The loss is then a
plain sum, the same for any micro-batches and any number of ranks. The exception is bnpo, which is defined as a mean
over micro-batches.

Sources: DeepSeekMath (Shao et al. 2024), equations 3 (surrogate) and 4 (k3), unless a function names another source.
docs/losses.md has all formulas side by side. B completions, C tokens in the longest.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_ds.core.objective import KlEstimator, LossType, Objective, unknown_name
from grpo_ds.core.surrogates import choose_surrogate

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: larger ratios overflow and are useless for a step


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss, and its parts per token for the metrics; 0 and False if a token does not count.

    Example: two tokens of advantage 1 that weigh 1/2 each, with ratios 1.5 (clipped at 1.2) and 1.
        >>> old = torch.tensor([[0.5, 0.5]]).log()
        >>> policy, settings = torch.tensor([[0.75, 0.5]]).log(), Objective(beta=0.0, max_completion_length=2)
        >>> terms = grpo_loss(policy, old, old, torch.ones(1, 1), torch.full((1, 2), 0.5), settings)
        >>> terms.loss, terms.high
        (tensor(-1.1000), tensor([[ True, False]]))
    """

    loss: Float[Tensor, ""]
    kl: Float[Tensor, "B C"]  # the estimate in the loss; 0 when beta is 0
    low: Bool[Tensor, "B C"]  # clipped at 1 - epsilon: the surrogate has no gradient here
    high: Bool[Tensor, "B C"]  # clipped at 1 + epsilon_high: no gradient; under cispo a bounded one
    clipped: Bool[Tensor, "B C"]  # low, high, or beyond delta


def token_weights(
    mask: Bool[Tensor, "B C"], *, loss_type: LossType, sequences: int, tokens: int, max_completion_length: int
) -> Float[Tensor, "B C"]:
    """Share of each counted token in the step's loss; other tokens weigh 0.

    grpo, gspo, sapo: each sequence weighs 1 / sequences, shared evenly by its tokens (DeepSeekMath eq. 3, GSPO eq. 5).
    dapo, cispo, vespo, bnpo: each token weighs 1 / tokens (DAPO eq. 8, MiniMax-M1 eq. 4).
    luspo: each token weighs 1 / sequences, so that a sequence counts by its length (LUSPO, 2026).
    dr_grpo: each token weighs 1 / (sequences * max_completion_length) (Liu et al. 2025, section 3.2).

    sequences, tokens: counted in the optimizer step, over all micro-batches and ranks. For bnpo
        `tokens` is the number in this micro-batch times the number of micro-batches.
    max_completion_length: tokens.
    """
    if loss_type in ("grpo", "gspo", "sapo"):
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        return mask / (lengths * max(sequences, 1))
    if loss_type == "dr_grpo":
        return mask / (max(sequences, 1) * max_completion_length)
    if loss_type in ("dapo", "cispo", "vespo", "bnpo"):
        return mask / max(tokens, 1)
    if loss_type == "luspo":
        return mask / max(sequences, 1)
    raise unknown_name("loss_type", loss_type, LossType)


def entropy_bonus(
    entropies: Float[Tensor, "B C"], chosen: Bool[Tensor, "B C"], objective: Objective, *, tokens: int
) -> Float[Tensor, ""]:
    """entropy_coef times the sum of these tokens' share of the step's mean entropy; the loss subtracts it.

    The same for every loss type, as in TRL: a mean over tokens.

    entropies: nats, with gradient. chosen: tokens that count. tokens: their number in the step, on all ranks.
    """
    if not objective.entropy_coef:
        return entropies.new_zeros(())
    return objective.entropy_coef * (entropies * chosen).sum() / max(tokens, 1)


def most_uncertain(
    entropies: Float[Tensor, "B C"], counted: Bool[Tensor, "B C"], *, share: float, step_entropies: Float[Tensor, " N"]
) -> Bool[Tensor, "B C"]:
    """Counted tokens with an entropy from the (1 - share) quantile up (Wang et al. 2025, Beyond the 80/20 Rule).

    share: from 0 (only the highest) to 1 (all). step_entropies: of the counted tokens of this step on all ranks.
    """
    if not len(step_entropies):
        return counted
    return counted & (entropies >= torch.quantile(step_entropies, 1 - share))


def importance_ratio(
    policy_logprobs: Float[Tensor, "B W"],
    old_logprobs: Float[Tensor, "B W"],
    counted: Bool[Tensor, "B C"],
    *,
    loss_type: LossType,
) -> Float[Tensor, "B W"]:
    """Ratio policy / old of each token; under gspo and luspo the sequence's geometric mean, at each token (GSPO eq. 7).

    With labels, the columns after C, advantages differ within a sequence: this ratio then has the value of the
    sequence's and the gradient of the token's or label's (GSPO-token, GSPO section 4.3).
    """
    log_ratio = policy_logprobs - old_logprobs
    if loss_type in ("gspo", "luspo"):
        lengths = counted.sum(dim=1, keepdim=True).clamp(min=1)
        own = log_ratio[:, : counted.shape[1]].where(counted, 0)
        sequence = own.sum(dim=1, keepdim=True) / lengths
        if log_ratio.shape == counted.shape:
            log_ratio = sequence.expand_as(log_ratio)
        else:
            log_ratio = sequence.detach() + policy_logprobs - policy_logprobs.detach()
    elif loss_type not in get_args(LossType):
        raise unknown_name("loss_type", loss_type, LossType)
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
    """KL(policy || ref) of each token, with Schulman's names; with d = ref - policy: k1 = -d, k2 = d^2 / 2, k3 above.

    As losses on fresh samples they have different expected gradients: k1: 0; k2: the gradient of KL(policy || ref);
    k3: the gradient of KL(ref || policy); k3_corrected, which is k3 times the ratio with the ratio's own gradient:
    KL(policy || ref) (DeepSeek-V3.2, section 3.1).
    """
    if estimator == "k1":
        return policy_logprobs - ref_logprobs
    if estimator == "k2":
        return (policy_logprobs - ref_logprobs).square() / 2
    if estimator == "k3":
        return kl_k3(policy_logprobs, ref_logprobs)
    if estimator == "k3_corrected":
        return kl_k3(policy_logprobs, ref_logprobs) * ratio
    raise unknown_name("kl_estimator", estimator, KlEstimator)


def grpo_loss(
    policy_logprobs: Float[Tensor, "B W"],
    old_logprobs: Float[Tensor, "B W"],
    ref_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, "B _"],
    weights: Float[Tensor, "B W"],
    objective: Objective,
    *,
    kl_weights: Float[Tensor, "B C"] | None = None,
) -> LossTerms:
    """Sum over tokens of weights * (beta * KL - surrogate).

    W is C, or C + n with the n labels that an answer might have been (expected_reward.py): they have a surrogate
    and no KL, and are not in the terms.

    policy_logprobs, old_logprobs, ref_logprobs: nats, of the trained policy (with gradient), of the policy that
        sampled, and of the reference (not read if beta is 0).
    advantages: of each token, or one column: the same for all tokens of a completion.
    weights: from `token_weights`. A masked token must have weight 0 and finite log-probs (0 works).
    kl_weights: of the KL, from `token_weights`, if `weights` leaves counted tokens out; None: the same.
    """
    tokens = slice(ref_logprobs.shape[1])
    kl_weights = weights[:, tokens] if kl_weights is None else kl_weights
    counted = kl_weights > 0
    ratio = importance_ratio(policy_logprobs, old_logprobs, counted, loss_type=objective.loss_type)
    surrogate = choose_surrogate(ratio, advantages, policy_logprobs, counted, objective)
    kl = torch.zeros_like(ref_logprobs)
    if objective.beta:
        kl = kl_estimate(policy_logprobs[:, tokens], ref_logprobs, ratio[:, tokens], estimator=objective.kl_estimator)
    loss = objective.beta * (kl_weights * kl).sum() - (weights * surrogate.values).sum()
    low, high, beyond = (it[:, tokens] & counted for it in (surrogate.low, surrogate.high, surrogate.beyond_delta))
    return LossTerms(loss, (kl * counted).detach(), low, high, low | high | beyond)
