"""Rewards as the grade of completions of which none is right or wrong: their means, and how these changed."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_ds.task.scoring import Rewards
from grpo_ds.task.statistics import bootstrap_interval, mean, paired_change


@dataclass(frozen=True, slots=True)
class Earned:
    """Figures of completions of which none is right or wrong: what the reward functions gave.

    Example: two completions; the second function does not apply to the second one.
        >>> earned(Rewards([1.5, 0.0], {"short": [1.0, 0.0], "cites": [0.5, None]})).mean_rewards
        {'short': 0.5, 'cites': 0.5}
    """

    count: int
    mean_reward: float
    mean_reward_interval: tuple[float, float]  # bootstrap, 95 %
    mean_rewards: dict[str, float | None]  # by function; None: it applied to no completion


def earned(rewards: Rewards) -> Earned:
    """Return the figures of the rewards of at least one completion."""
    applied = {name: [value for value in values if value is not None] for name, values in rewards.by_name.items()}
    return Earned(
        count=len(rewards.total),
        mean_reward=mean(rewards.total),
        mean_reward_interval=bootstrap_interval(rewards.total),
        mean_rewards={name: mean(values) if values else None for name, values in applied.items()},
    )


def compare_rewards(before: Sequence[float], after: Sequence[float]) -> dict[str, float | tuple[float, float]]:
    """Return the mean change of the reward on the same questions, its interval, and the p-value of no change."""
    change, interval, p_value = paired_change(before, after)
    return {"reward_change": change, "reward_change_interval": interval, "reward_p_value": p_value}
