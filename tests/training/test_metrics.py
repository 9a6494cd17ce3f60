"""The metrics of a step."""

from types import SimpleNamespace

import torch

from grpo_ds.system.ranks import World
from grpo_ds.training.metrics import _logged


def test_what_rewards_log_takes_no_name_of_another_line():
    """A line's `step`, and `eval/...`, by which the run knows that a step was evaluated."""
    metrics = {"share": [0.25, 0.75], "step": [99.0], "eval/accuracy": [1.0]}
    done = SimpleNamespace(rollout=SimpleNamespace(rewards=SimpleNamespace(metrics=metrics)))
    assert _logged(done, World(0, 1, torch.device("cpu"))) == {"share": 0.5}
