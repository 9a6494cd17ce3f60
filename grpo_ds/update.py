"""One optimizer step on a rollout: the clipped GRPO update.

The weights of all tokens are fixed before the batch is split into backwards, so splitting it
(--micro_groups), or sharing it among ranks, changes memory and nothing else.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.tally import Tally
from grpo_ds.engine import Engine, flag_last
from grpo_ds.memory.phases import Profiler
from grpo_ds.rollouts import Rollout


def update(
    engine: Engine,
    rollout: Rollout,
    profiler: Profiler,
    *,
    old_logprobs: Float[Tensor, "B C"] | None,
    micro_groups: int,
    ranks: int,
    epsilon: float,
    beta: float,
) -> tuple[Tally, Float[Tensor, "B C"]]:
    """What happened, for all ranks' tallies to be summed, and the log-probs before the step.

    old_logprobs: of the policy that sampled; None when that is the policy itself, whose own are then the old ones.
    """
    tally, step_loss = Tally(), 0.0
    mask = rollout.completions.mask
    weights = token_weights(mask, sequences=len(mask) * ranks)
    logprobs = torch.zeros(mask.shape, device=mask.device)
    for (rows, part), last in flag_last(rollout.micro_batches(micro_groups)):
        policy_logprobs = engine(rows)
        logprobs[part] = policy_logprobs.detach()
        terms = grpo_loss(
            policy_logprobs,
            (logprobs if old_logprobs is None else old_logprobs)[part],
            rollout.ref_logprobs[part],
            rollout.advantages[part],
            weights[part],
            epsilon=epsilon,
            beta=beta,
        )
        engine.backward(terms.loss, last=last)
        step_loss += float(terms.loss.detach())
        tally.add("kl", terms.kl.sum(), rows.mask.sum())
        tally.add("clip_fraction", terms.clipped.sum(), rows.mask.sum())
    with profiler.phase("step"):
        tally.add("grad_norm", engine.step())
    tally.add("loss", step_loss * ranks)  # a rank holds its share of the sum; the mean over ranks is the whole
    return tally, logprobs
