"""The GRPO loss as a weighted sum over tokens.

What a token weighs is fixed once per optimizer step, before the batch is split: the loss is then a
plain sum and comes out the same for any micro-batches and any number of ranks.

Source: DeepSeekMath (Shao et al. 2024), equations 3 (surrogate) and 4 (KL estimator k3).
B completions, C tokens in the longest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: past it exp only overflows, and no optimizer step should follow it


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss, and per token what it was made of."""

    loss: Float[Tensor, ""]
    kl: Float[Tensor, "B C"]  # k3 to the reference; 0 where masked or beta is 0
    clipped: Bool[Tensor, "B C"]  # the clipped branch was the smaller one: this token has no gradient


def token_weights(mask: Bool[Tensor, "B C"], *, sequences: int) -> Float[Tensor, "B C"]:
    """Each sequence weighs 1 / sequences, shared evenly by its tokens (eq. 3's two means).

    `sequences`: completions in the whole optimizer step, over all micro-batches and ranks.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask / (lengths * sequences)


def kl_k3(policy_logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """e^d - d - 1 with d = ref - policy: never negative, exact to first order at d = 0 (eq. 4)."""
    d = (ref_logprobs - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d


def grpo_loss(
    policy_logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    ref_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    weights: Float[Tensor, "B C"],
    *,
    epsilon: float,
    beta: float,
) -> LossTerms:
    """Sum of weights * (beta * KL - min(ratio A, clip(ratio) A)).

    Masked tokens must have weight 0 and finite log-probs (0 will do). With beta 0 the reference's
    values are not looked at.
    """
    advantage = advantages[:, None]
    ratio = (policy_logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free, clipped = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    kl = kl_k3(policy_logprobs, ref_logprobs) if beta else torch.zeros_like(policy_logprobs)
    loss = (weights * (beta * kl - torch.minimum(free, clipped))).sum()
    counted = weights > 0
    return LossTerms(loss, (kl * counted).detach(), (clipped < free) & counted)
