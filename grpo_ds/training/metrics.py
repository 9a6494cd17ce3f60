"""The metrics of a step over all ranks, under TRL's names if TRL has the metric (docs/trackers.md lists all).

Names are set beside the computation: rewards, lengths and accuracy in rollout.py (`count_into`), kl, entropy and
clip ratios in update.py (`TOKEN_METRICS`), seconds and memory here, epoch and num_tokens in trainer.py
(`finish_step`); report/metric_names.py has the names that several readers share.
"""

import torch

from grpo_ds.memory.phases import Profiler
from grpo_ds.memory.plan import GIB
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system.ranks import World
from grpo_ds.training.rollout import PartialStep


def step_metrics(
    config: TrainConfig, done: PartialStep, world: World, profiler: Profiler, first_span: int
) -> dict[str, float]:
    """Return the means, deviations, seconds and memory of a step; every rank calls it.

    first_span: index of the step's first span in the profiler.
    """
    tally, rollout = done.tally, done.rollout
    rollout.count_into(tally, config.answer_format)
    if config.dynamic_sampling:
        tally.add("redrawn", done.redrawn)
    if config.on_reward_error == "zero":  # the sum over ranks, not their mean
        tally.add("reward_errors", len(rollout.rewards.errors) * world.size)
    uses = profiler.uses(first_span).values()
    for use in uses:
        tally.add(f"seconds/{use.phase}", use.seconds)
    means = tally.means(world.sum(tally.as_tensor()))
    tokens = means["completions/mean_length"] * len(rollout.texts) * world.size
    seconds = sum(means[f"seconds/{use.phase}"] for use in uses)
    memory = {"memory/ram_gib": profiler.peak("ram") / GIB}
    if world.device.type == "cuda":
        memory["memory/gpu_peak_gib"] = profiler.peak("gpu") / GIB
    return {
        **_logged(done, world),  # first: no name of ours is replaced
        **means,
        **_deviations(done, world),
        "tokens_per_second": tokens / seconds,
        "step_time": seconds,
        **memory,
    }


def _deviations(done: PartialStep, world: World) -> dict[str, float]:
    """Standard deviation of each reward over the completions of all ranks."""
    ranks = world.gather(done.rollout.rewards_by_metric())
    return {name: _deviation([value for rank in ranks for value in rank[name]]) for name in ranks[0]}


def _logged(done: PartialStep, world: World) -> dict[str, float]:
    """Mean of each metric that reward functions log, over its values of all ranks; not of the names of other lines."""
    ranks = world.gather(done.rollout.rewards.metrics)
    names = sorted({name for rank in ranks for name in rank if name != "step" and not name.startswith("eval/")})
    values = {name: [value for rank in ranks for value in rank.get(name, ())] for name in names}
    return {name: sum(it) / len(it) for name, it in values.items()}


def _deviation(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0
