"""Dynamic sampling: a group whose rewards are all equal teaches nothing, so another question is asked in its place.

Source: DAPO (Yu et al. 2025), section 3.2 and eq. 11. Bounded here, so that a step ends also when no group differs.
Each rank draws by itself, as often as it needs; afterwards every rank holds as many groups as without.
Q questions, G completions each, B = Q * G.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from grpo_ds.task.scoring import Rewards
from grpo_ds.training.rollout import Groups
from grpo_ds.training.sampling import Completions

Draw = Callable[[int, Sequence[int]], Groups]  # (attempt, places in the step) -> a group for each of these places
Item = TypeVar("Item")


def draw_groups(draw: Draw, *, count: int, attempts: int) -> tuple[Groups, int]:
    """`count` groups and how many were exchanged on the way: attempt 0 draws all, 1 to `attempts` those still equal."""
    groups, exchanged = draw(0, range(count)), 0
    for attempt in range(1, attempts + 1):
        places = groups.equal()
        if not places:
            break
        groups = exchange(groups, places, draw(attempt, places))
        exchanged += len(places)
    return groups, exchanged


def exchange(groups: Groups, places: Sequence[int], fresh: Groups) -> Groups:
    """`groups` with those at `places` replaced by `fresh`, in order."""
    count, size = len(groups.questions), len(groups.texts) // len(groups.questions)
    fresh_at = {place: count + number for number, place in enumerate(places)}
    order = [fresh_at.get(place, place) for place in range(count)]
    rows = [place * size + row for place in order for row in range(size)]
    names = groups.rewards.by_name
    return Groups(
        _pick(groups.questions, fresh.questions, order),
        _pick(groups.prompts, fresh.prompts, order),
        _pick_rows(groups.completions, fresh.completions, rows),
        _pick(groups.texts, fresh.texts, rows),
        Rewards(
            _pick(groups.rewards.total, fresh.rewards.total, rows),
            {name: _pick(names[name], fresh.rewards.by_name[name], rows) for name in names},
            {**groups.rewards.errors, **fresh.rewards.errors},
        ),
    )


def _pick(first: Sequence[Item], second: Sequence[Item], order: Sequence[int]) -> list[Item]:
    both = [*first, *second]
    return [both[i] for i in order]


def _pick_rows(first: Completions, second: Completions, rows: Sequence[int]) -> Completions:
    mask = _stacked(first.mask, second.mask)[rows]
    width = int(mask.sum(dim=1).max())  # the longest may have gone
    ids = _stacked(first.ids, second.ids)[rows]
    return Completions(ids[:, :width], mask[:, :width], torch.cat([first.ended, second.ended])[rows])


def _stacked(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One below the other, the narrower filled with 0: no token, where the mask says False."""
    width = max(first.shape[1], second.shape[1])
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in (first, second)])
