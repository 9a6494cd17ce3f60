"""One optimizer step on a rollout: the clipped GRPO update.

The weights of all tokens are fixed before the batch is split into backwards, so splitting it
(--micro_groups), or sharing it among ranks, changes memory and nothing else (bnpo aside).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.objective import Objective
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
    micro_groups: int,
    world: World,
    objective: Objective,
) -> tuple[Tally, Float[Tensor, "B C"]]:
    """What happened, for all ranks' tallies to be summed, and the log-probs before the step.

    old_logprobs: of the policy that sampled; None when that is the policy itself, whose own are then the old ones.
    """
    tally, step_loss = Tally(), 0.0
    counted = rollout.counted
    parts = list(rollout.micro_batches(micro_groups))
    weights = step_weights(counted, [part for _, part in parts], world, objective)
    logprobs = torch.zeros(counted.shape, device=counted.device)
    for (rows, part), last in flag_last(parts):
        policy_logprobs = engine(rows)
        logprobs[part] = policy_logprobs.detach()
        terms = grpo_loss(
            policy_logprobs,
            (logprobs if old_logprobs is None else old_logprobs)[part],
            rollout.ref_logprobs[part],
            rollout.advantages[part],
            weights[part],
            objective,
        )
        engine.backward(terms.loss, last=last)
        step_loss += float(terms.loss.detach())
        tokens = counted[part].sum()
        tally.add("kl", terms.kl.sum(), tokens)
        tally.add("entropy", engine.policy.entropies[counted[part]].sum(), tokens)
        tally.add("clip_ratio/low", terms.low.sum(), tokens)
        tally.add("clip_ratio/high", terms.high.sum(), tokens)
        tally.add("clip_fraction", terms.clipped.sum(), tokens)
    with profiler.phase("step"):
        tally.add("grad_norm", engine.step())
    tally.add("loss", step_loss * world.size)  # a rank holds its share of the sum; the mean over ranks is the whole
    return tally, logprobs


def step_weights(
    counted: Bool[Tensor, "B C"], parts: Sequence[slice], world: World, objective: Objective
) -> Float[Tensor, "B C"]:
    """Each token's share of the loss of the whole step: all micro-batches (`parts` of the B rows), all ranks."""
    here = torch.stack([counted.any(dim=1).sum(), counted.sum(), torch.tensor(len(parts), device=counted.device)])
    sequences, tokens, micro_batches = world.sum(here).tolist()
    kind, longest = objective.loss_type, objective.max_completion_length

    def weigh(mask: Tensor, tokens: int) -> Tensor:
        return token_weights(mask, loss_type=kind, sequences=sequences, tokens=tokens, max_completion_length=longest)

    if kind != "bnpo":
        return weigh(counted, tokens)
    weights = torch.zeros(counted.shape, device=counted.device)
    for part in parts:
        weights[part] = weigh(counted[part], int(counted[part].sum()) * micro_batches)
    return weights
