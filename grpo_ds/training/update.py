"""One optimizer step on a rollout: the clipped GRPO update.

The weights of all tokens are fixed before the batch is split into backwards. So splitting (--pack_tokens) and more
ranks change only memory, not the result (except with bnpo). Completions that add exactly 0 to the gradient are not
computed; the weights of the others stay the same.

B completions, C tokens in the longest; W = C, or C + n with n labels (core/expected_reward.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_ds.core.expected_reward import label_weights
from grpo_ds.core.losses import LossTerms, entropy_bonus, grpo_loss, most_uncertain, token_weights
from grpo_ds.core.objective import Objective
from grpo_ds.core.tally import Tally
from grpo_ds.memory.phases import Profiler
from grpo_ds.system.ranks import World
from grpo_ds.training.engine import Engine, flag_last
from grpo_ds.training.nonfinite import find_bad, is_overflow
from grpo_ds.training.rollout import MicroBatch, Rollout

TOKEN_METRICS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@dataclass(frozen=True, slots=True)
class Updated:
    """The result of an update on this rank.

    Example: a step that was skipped on all ranks
        Updated(tally, logprobs, bad=["log-prob (completion 2 of question 17)", "loss"])
    """

    tally: Tally  # this rank's sums, not yet added over ranks
    logprobs: Float[Tensor, "B W"]  # of the policy before the step
    bad: list[str]  # numbers that are not finite on some rank, cause first; if any, no step was taken
    overflow: bool = False  # fp16: no step was taken, as a gradient times the loss scale is too large


def update(
    engine: Engine,
    rollout: Rollout,
    profiler: Profiler,
    *,
    old_logprobs: Float[Tensor, "B W"] | None,
    pack_tokens: int,
    world: World,
    objective: Objective,
    advance: Callable[[int, int], None] = lambda done, tokens: None,
) -> Updated:
    """Take one step on all ranks, or on none if a number on any of them is not finite.

    old_logprobs: of the policy that sampled; None if that is the current policy: its own log-probs are used.
    pack_tokens: maximum tokens per backward; 0: all in one. advance: called after each backward with the number of
    its completions.
    """
    tally, step_loss = Tally(), 0.0
    tally.add_all({name: [] for name in TOKEN_METRICS})  # a rank that skips everything has the same names
    counted = rollout.counted
    batches = rollout.micro_batches(pack_tokens, only=contributing(rollout, objective))
    weights = step_weights(counted, [part for _, part in batches], world, objective)
    backwards = world.largest(len(batches))
    chosen = chosen_tokens(engine, batches, counted, world, objective)
    chosen_count = int(world.sum(chosen.sum()))
    # Ranks exchange gradients in every backward, so a rank with fewer batches adds some of weight 0.
    spare = (batches or rollout.micro_batches(pack_tokens))[:1] * (backwards - len(batches))
    logprobs = torch.zeros(len(counted), counted.shape[1] + rollout.label_columns, device=counted.device)
    for number, ((rows, part), last) in enumerate(flag_last([*spare, *batches])):
        policy_logprobs = engine(rows, entropy_gradient=objective.entropy_coef != 0)
        if number < len(spare):
            engine.backward(0 * policy_logprobs.sum(), last=last)
            continue
        logprobs[part] = policy_logprobs.detach()
        old = (logprobs if old_logprobs is None else old_logprobs)[part]
        terms = part_loss(policy_logprobs, old, rollout, part, weights[part], chosen[part], objective)
        bonus = entropy_bonus(engine.policy.entropies, chosen[part], objective, tokens=chosen_count)
        terms = replace(terms, loss=terms.loss - bonus)
        engine.backward(terms.loss, last=last)
        advance(len(part), 0)
        step_loss += float(terms.loss.detach())
        add_token_metrics(tally, terms, engine.policy.entropies.detach(), counted[part])
    bad, overflow, scale = [], False, engine.loss_scale.value
    with profiler.phase("step"):
        # Without a backward there is no gradient, and momentum and weight decay must not change the weights.
        if backwards:
            # Checked only now: a rank that stopped earlier would leave the others waiting in a backward.
            bad = find_bad(engine, rollout, old_logprobs, logprobs, step_loss, world)
            if overflow := is_overflow(engine, bad):
                engine.skip_overflow()
            elif bad:
                engine.abandon()
        tally.add("grad_norm", float("nan") if bad else engine.step() if backwards else 0.0)
    tally.add("bad_steps", bool(bad) and not overflow)
    if engine.loss_scale.fp16:
        tally.add_all({"overflow_steps": [overflow], "loss_scale": [scale]})
    tally.add("loss", step_loss * world.size)  # each rank holds a share of the sum
    return Updated(tally, logprobs, [] if overflow else bad, overflow)


def part_loss(
    policy_logprobs: Float[Tensor, "b W"],
    old_logprobs: Float[Tensor, "b W"],
    rollout: Rollout,
    part: Int[Tensor, " b"],
    weights: Float[Tensor, "b C"],
    chosen: Bool[Tensor, "b C"],
    objective: Objective,
) -> LossTerms:
    """Share of some completions in the step's loss, without the entropy bonus.

    part: their indices; weights: of their tokens; chosen: tokens with a surrogate, as of `chosen_tokens`.
    """
    kl_weights, weights = weights, weights * chosen
    if rollout.label_columns and rollout.labels:
        of_labels = label_weights(weights, old_logprobs[:, weights.shape[1] :], rollout.labels.places[part])
        weights = torch.cat([weights, of_labels], dim=1)
    advantages = rollout.all_advantages()[part]
    ref_logprobs = rollout.ref_logprobs[part]
    return grpo_loss(policy_logprobs, old_logprobs, ref_logprobs, advantages, weights, objective, kl_weights=kl_weights)


def chosen_tokens(
    engine: Engine, batches: Sequence[MicroBatch], counted: Bool[Tensor, "B C"], world: World, objective: Objective
) -> Bool[Tensor, "B C"]:
    """Counted tokens, with top_entropy_quantile only the most uncertain of the step; every rank calls it.

    These are known only after a forward of all backwards, which is one more.
    """
    if objective.top_entropy_quantile == 1:
        return counted
    entropies = torch.zeros(counted.shape, device=counted.device)
    with torch.no_grad():
        for rows, part in batches:
            engine(rows)
            entropies[part] = engine.policy.entropies
    everywhere = [entropy for rank in world.gather(entropies[counted].tolist()) for entropy in rank]
    of_step = torch.tensor(everywhere, device=counted.device)
    return most_uncertain(entropies, counted, share=objective.top_entropy_quantile, step_entropies=of_step)


def add_token_metrics(
    tally: Tally, terms: LossTerms, entropies: Float[Tensor, "B C"], counted: Bool[Tensor, "B C"]
) -> None:
    """Add a backward's sums over its counted tokens, one for each of TOKEN_METRICS."""
    sums = terms.kl, entropies[counted], terms.low, terms.high, terms.clipped
    for name, values in zip(TOKEN_METRICS, sums, strict=True):
        tally.add(name, values.sum(), counted.sum())


def contributing(rollout: Rollout, objective: Objective) -> list[int]:
    """Indices of the completions whose gradient is not exactly 0.

    Completions without counted tokens are left out. Without a KL and an entropy bonus, completions of advantage 0 are
    too, except with bnpo, which divides by the tokens of its micro-batch, and top_entropy_quantile, which compares all.
    """
    some = rollout.counted.any(dim=1)
    everywhere = objective.beta or objective.entropy_coef or objective.top_entropy_quantile < 1
    if not everywhere and objective.loss_type != "bnpo":
        some &= (rollout.all_advantages() != 0).any(dim=1)
    return some.nonzero().flatten().tolist()


def step_weights(
    counted: Bool[Tensor, "B C"], parts: Sequence[Tensor], world: World, objective: Objective
) -> Float[Tensor, "B C"]:
    """Share of each token in the step's loss, over all micro-batches (`parts` of the B rows) and all ranks."""
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
