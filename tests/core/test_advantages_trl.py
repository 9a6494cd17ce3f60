"""Our advantages against TRL's on the same rewards, by TRL's own lines."""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from grpo_ds.system.ranks import World
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.rollout import Groups, advantages_of
from grpo_ds.training.sampling import Completions

pytestmark = pytest.mark.peer("trl")
SIZE, NAN = 4, float("nan")
FIRST, LAST = "if self.multi_objective_aggregation ==", "# Slice to keep only the local part"


def trl_advantages(rewards, weights, aggregation, scale):
    """Run the lines of TRL's trainer that turn rewards into advantages."""
    from trl import GRPOTrainer
    from trl.trainer.utils import nanstd

    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    start = source.index(FIRST)
    lines = textwrap.dedent(" " * 4 + source[start : source.index(LAST)])
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation, scale_rewards=scale, reward_weights=weights,
            reward_funcs=[None] * len(weights),
        ),
        "torch": torch, "nanstd": nanstd, "device": "cpu", "num_generations": SIZE, "rewards_per_func": rewards,
        "unscorable_mask": rewards.isnan().all(dim=1),
    }  # fmt: skip
    exec(lines, names)
    return names["advantages"]


def groups_of(rewards, weights):
    by_name = {
        str(k): [None if value != value else float(w * value) for value in column]
        for k, (w, column) in enumerate(zip(weights.tolist(), rewards.T.tolist(), strict=True))
    }
    total = [sum(value or 0.0 for value in row) for row in zip(*by_name.values(), strict=True)]
    ids = torch.zeros(len(rewards), 1, dtype=torch.long)
    done = Completions(ids, ids == 0, (ids == 0)[:, 0])
    questions = [None] * (len(rewards) // SIZE)
    return Groups(questions, [], done, [""] * len(rewards), Rewards(total, by_name), None)


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [("normalize_then_sum", "group"), *(("sum_then_normalize", scale) for scale in ("group", "batch", "none"))],
)
@pytest.mark.parametrize("missing", [0.0, 0.3])  # share of functions that do not apply
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, -0.5, 0.1]])
def test_advantages_are_trls(aggregation, scale, missing, weights):
    g, weights = torch.Generator().manual_seed(0), torch.tensor(weights)
    rewards = torch.randint(0, 3, (24, 3), generator=g).float()
    rewards[torch.rand(24, 3, generator=g) < missing] = NAN
    rewards[:, 0] = rewards[:, 0].nan_to_num()  # TRL leaves out a completion that nothing scores, we give it 0
    names = {str(k): weight for k, weight in enumerate(weights.tolist())}
    world = World(0, 1, torch.device("cpu"))
    ours, _ = advantages_of(groups_of(rewards, weights), world, scale, 0.0, aggregation, names)
    torch.testing.assert_close(ours, trl_advantages(rewards, weights, aggregation, scale), atol=1e-5, rtol=1e-5)


def test_a_completion_that_nothing_scores_has_no_advantage_and_no_part_in_the_deviation():
    rewards, weights = torch.tensor([[0.0, 1.0], [NAN, NAN], [2.0, NAN], [1.0, 3.0]]), torch.ones(2)
    ours, _ = advantages_of(
        groups_of(rewards, weights), World(0, 1, torch.device("cpu")), "group", 0.0, "normalize_then_sum",
        {"0": 1.0, "1": 1.0},
    )  # fmt: skip
    assert ours[1] == 0
    torch.testing.assert_close(ours, trl_advantages(rewards, weights, "normalize_then_sum", "group"))
