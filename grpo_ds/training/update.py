"""One optimizer step on a rollout: the clipped GRPO update.

The weights of all tokens are fixed before the batch is split into backwards, so splitting it
(--pack_tokens), or sharing it among ranks, changes memory and nothing else (bnpo aside). Completions that add exactly
nothing are not computed; the weights of the others stay what they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.objective import Objective
from grpo_ds.core.tally import Tally
from grpo_ds.memory.phases import Profiler
from grpo_ds.system.ranks import World
from grpo_ds.training.engine import Engine, flag_last
from grpo_ds.training.nonfinite import find_bad
from grpo_ds.training.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Updated:
    """What became of an update."""

    tally: Tally  # for all ranks' to be summed
    logprobs: Float[Tensor, "B C"]  # the policy's before the step
    bad: list[str]  # what was not finite on any rank, the cause first; then the step was not taken


def update(
    engine: Engine,
    rollout: Rollout,
    profiler: Profiler,
    *,
    old_logprobs: Float[Tensor, "B C"] | None,
    pack_tokens: int,
    world: World,
    objective: Objective,
) -> Updated:
    """One step of all ranks, or of none where a number on any of them is not finite.

    old_logprobs: of the policy that sampled; None when that is the policy itself, whose own are then the old ones.
    """
    tally, step_loss = Tally(), 0.0
    # A rank that skips everything has the others' names.
    tally.add_all({name: [] for name in ("kl", "entropy", "clip_ratio/low", "clip_ratio/high", "clip_fraction")})
    counted = rollout.counted
    batches = rollout.micro_batches(pack_tokens, only=contributing(rollout, objective))
    weights = step_weights(counted, [part for _, part in batches], world, objective)
    logprobs = torch.zeros(counted.shape, device=counted.device)
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
    bad: list[str] = []
    with profiler.phase("step"):
        # Where there is nothing to learn, momentum and weight decay must not move the weights either.
        if backwards:
            # Only now, for a rank that left half-way would leave the others waiting in a backward.
            bad = find_bad(engine, rollout, old_logprobs, logprobs, step_loss, world)
            if bad:
                engine.abandon()
        tally.add("grad_norm", float("nan") if bad else engine.step() if backwards else 0.0)
    tally.add("bad_steps", bool(bad))
    tally.add("loss", step_loss * world.size)  # a rank holds its share of the sum; the mean over ranks is the whole
    return Updated(tally, logprobs, bad)


def contributing(rollout: Rollout, objective: Objective) -> list[int]:
    """The completions whose gradient is not exactly 0: not those that do not count, nor, without a KL, those of
    advantage 0. (bnpo divides by the tokens of its micro-batch, so there they have to be in it.)"""
    some = rollout.counted.any(dim=1)
    if not objective.beta and objective.loss_type != "bnpo":
        some &= rollout.advantages != 0
    return some.nonzero().flatten().tolist()


def step_weights(
    counted: Bool[Tensor, "B C"], parts: Sequence[Tensor], world: World, objective: Objective
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
