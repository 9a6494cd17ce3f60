"""Groups of equal rewards are exchanged, rows stay with their question, and drawing ends."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.collect import draw_groups
from grpo_ds.training.rollout import Groups
from grpo_ds.training.sampling import Completions

SIZE = 3  # completions a question


def groups_at(attempt, places, differs_at):
    """Groups whose texts name their origin; place p has unequal rewards from attempt differs_at[p] on."""
    names = [f"{attempt}/{place}" for place in places]
    tokens = torch.tensor([[100 * attempt + 10 * place + row] for place in places for row in range(SIZE)])
    width = 1 + (5 * attempt) % 7  # attempts have different lengths
    ids, mask = tokens.expand(-1, width).clone(), torch.ones(len(tokens), width, dtype=torch.bool)
    total = [1.5 + row * (attempt >= differs_at[place]) for place in places for row in range(SIZE)]
    return Groups(
        questions=[Question(name, "?", "", "yes") for name in names],
        prompts=[torch.tensor([attempt, place]) for place in places],
        completions=Completions(ids, mask, torch.full((len(ids),), attempt % 2 == 1)),
        texts=[f"{name}/{row}" for name in names for row in range(SIZE)],
        rewards=Rewards(total, {"half": [value / 2 for value in total]}),
        labels=None,
    )


@settings(deadline=None)  # the cores are shared
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 4))
def test_a_group_is_drawn_again_until_its_rewards_differ_or_the_attempts_are_over(differs_at, attempts):
    drawn = []

    def draw(attempt, places):
        drawn.append((attempt, list(places)))
        return groups_at(attempt, places, differs_at)

    groups, exchanged = draw_groups(draw, count=len(differs_at), attempts=attempts)
    last = [min(n, attempts) for n in differs_at]  # last attempt of each place
    assert exchanged == sum(last)
    assert [places for _, places in drawn[1:]] == [
        [p for p, n in enumerate(differs_at) if n >= attempt] for attempt in range(1, max(last) + 1)
    ]
    assert groups.without_spread() == [p for p, n in enumerate(differs_at) if n > attempts]
    for place, attempt in enumerate(last):
        wanted, rows = groups_at(attempt, [place], {place: differs_at[place]}), slice(place * SIZE, (place + 1) * SIZE)
        assert groups.questions[place] == wanted.questions[0]
        assert torch.equal(groups.prompts[place], wanted.prompts[0])
        assert groups.texts[rows] == wanted.texts
        assert groups.rewards.total[rows] == wanted.rewards.total
        assert groups.rewards.by_name["half"][rows] == wanted.rewards.by_name["half"]
        assert torch.equal(groups.completions.ended[rows], wanted.completions.ended)
        for ids, mask, its in zip(
            groups.completions.ids[rows], groups.completions.mask[rows], wanted.completions.ids, strict=True
        ):
            assert torch.equal(ids[mask], its)
    assert groups.completions.mask.sum(dim=1).max() == groups.completions.ids.shape[1]  # no column holds only padding


def test_with_gdpo_a_group_is_drawn_again_only_if_every_reward_is_equal():
    """Right in no form and wrong in form earn the same sum, and two different advantages."""
    groups = groups_at(0, [0, 1], {0: 9, 1: 9})
    by_name = {"right": [1.5, 0.5, 1.0, 1.0, 1.0, 1.0], "form": [0.0, 1.0, 0.5, 0.5, 0.5, 0.5]}
    groups = replace(groups, rewards=Rewards([1.5] * 6, by_name))
    assert groups.without_spread() == [0, 1]
    assert groups.without_spread(by_name=True) == [1]
