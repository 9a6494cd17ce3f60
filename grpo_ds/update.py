"""One optimizer step on a rollout: the clipped GRPO update.

The weights of all tokens are fixed before the batch is split into backwards, so splitting it
(--pack_tokens), or sharing it among ranks, changes memory and nothing else. Completions that add nothing, those of
advantage 0 without a KL, are not computed; the weights of the others stay what they were.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.tally import Tally
from grpo_ds.engine import Engine, flag_last
from grpo_ds.memory.phases import Profiler
from grpo_ds.rollouts import Rollout
from grpo_ds.world import World


def update(
    engine: Engine,
    rollout: Rollout,
    profiler: Profiler,
    *,
    old_logprobs: Float[Tensor, "B C"] | None,
    pack_tokens: int,
    world: World,
    epsilon: float,
    beta: float,
) -> tuple[Tally, Float[Tensor, "B C"]]:
    """What happened, for all ranks' tallies to be summed, and the log-probs before the step.

    old_logprobs: of the policy that sampled; None when that is the policy itself, whose own are then the old ones.
    """
    tally, step_loss = Tally(), 0.0
    tally.add_all({"kl": [], "clip_fraction": []})  # a rank that skips everything has the others' names
    mask = rollout.completions.mask
    weights = token_weights(mask, sequences=len(mask) * world.size)
    logprobs = torch.zeros(mask.shape, device=mask.device)
    batches = rollout.micro_batches(pack_tokens, skip_zeros=not beta)
    backwards = world.largest(len(batches))
    # Ranks meet in every backward, so a rank with fewer batches runs some that count for nothing.
    spare = (batches or rollout.micro_batches(pack_tokens))[:1] * (backwards - len(batches))
    for number, ((rows, part), last) in enumerate(flag_last([*spare, *batches])):
        policy_logprobs = engine(rows)
        if number < len(spare):
            engine.backward(0 * policy_logprobs.sum(), last=last)
            continue
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
    grad_norm = 0.0
    if backwards:  # else there is nothing to learn, and momentum and weight decay must not move the weights either
        with profiler.phase("step"):
            grad_norm = engine.step()
    tally.add("grad_norm", grad_norm)
    tally.add("loss", step_loss * world.size)  # a rank holds its share of the sum; the mean over ranks is the whole
    return tally, logprobs
