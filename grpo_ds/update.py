"""One rollout, mu optimizer steps: the clipped GRPO update.

The weights of all tokens are fixed before the batch is split into backwards, so splitting it
(--micro_groups), or sharing it among ranks, changes memory and nothing else.
"""

import torch

from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.tally import Tally
from grpo_ds.engine import Engine
from grpo_ds.rollouts import Rollout


def update(
    engine: Engine, rollout: Rollout, *, mu: int, micro_groups: int, ranks: int, epsilon: float, beta: float
) -> Tally:
    """mu steps on one rollout. Returns what happened, for all ranks' tallies to be summed."""
    tally = Tally()
    mask = rollout.completions.mask
    weights = token_weights(mask, sequences=len(mask) * ranks)
    old_logprobs = torch.zeros(mask.shape, device=mask.device)
    for k in range(mu):
        step_loss = 0.0
        for rows, part in rollout.micro_batches(micro_groups):
            policy_logprobs = engine(rows)
            if k == 0:  # sampled and trained by the same weights: the first step's own values are the old ones
                old_logprobs[part] = policy_logprobs.detach()
            terms = grpo_loss(
                policy_logprobs,
                old_logprobs[part],
                rollout.ref_logprobs[part],
                rollout.advantages[part],
                weights[part],
                epsilon=epsilon,
                beta=beta,
            )
            engine.backward(terms.loss)
            step_loss += float(terms.loss.detach())
            tally.add("kl", terms.kl.sum(), rows.mask.sum())
            tally.add("clip_fraction", terms.clipped.sum(), rows.mask.sum())
        tally.add("grad_norm", engine.step())
        tally.add("loss", step_loss * ranks)  # a rank holds its share of the sum; the mean over ranks is the whole
    return tally


def backwards_per_step(questions: int, micro_groups: int) -> int:
    """How many micro-batches a step has: the same on every rank."""
    return -(-questions // micro_groups) if micro_groups else 1
