"""Packed rows: a prompt is computed once for its G completions; they see it but not each other.

A row is [prompt | c1 | ... | cG | padding]. Position ids restart after the prompt for every completion. The attention
mask lets a token see the prompt and the earlier tokens of its own completion, so each completion gets exactly the
hidden states that it would get in a separate row. The last token of a completion is a target but not an input,
because its prediction is not trained.

A group may be split over several rows, each with the prompt.

Q prompts; R rows, L tokens in the longest row; B completions, C tokens in the longest; W = C, or C + n labels.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from grpo_ds.core.pick import NOWHERE

PROMPT, PADDING = 0, -1  # segment numbers; completion k of a row is segment k, from 1


class Labels(NamedTuple):
    """Targets beside the tokens of a completion: the labels, at the place where it answers.

    Example: the second of two completions has no answer.
        >>> labels = Labels(places=torch.tensor([7, NOWHERE]), ids=torch.tensor([9693, 2201]))
    """

    places: Int[Tensor, " B"]  # index of the answer's first token; NOWHERE: none
    ids: Int[Tensor, " n"]  # first token of each label


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Groups laid out for one forward pass, and the position that predicts each completion token.

    Example: the prompt [5, 6] with the completions [7, 8] and [9, 4]. 6 predicts 7 and 9, 7 predicts 8, 9 predicts 4.
        >>> ids = torch.tensor([[7, 8], [9, 4]])
        >>> rows = pack_groups([torch.tensor([5, 6])], ids, torch.ones(2, 2, dtype=torch.bool), pad_id=0)
        >>> rows.input_ids.tolist(), rows.position_ids.tolist(), rows.segments.tolist()
        ([[5, 6, 7, 9]], [[0, 1, 2, 2]], [[0, 0, 1, 2]])
        >>> rows.sources.tolist(), rows.targets.tolist()
        ([[1, 2], [1, 3]], [[7, 8], [9, 4]])
    """

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    segments: Int[Tensor, "R L"]  # PROMPT, 1..G, or PADDING
    sources: Int[Tensor, "B C"]  # flat index into R * L of the token that predicts the target; 0 if masked
    targets: Int[Tensor, "B C"]
    mask: Bool[Tensor, "B C"]  # True: a token of the completion
    labels: Labels | None = None

    def to(self, device: torch.device) -> "PackedRows":
        """Return the same rows on another device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)[:-1]}
        return replace(self, **moved, labels=self.labels and Labels(*(it.to(device) for it in self.labels)))

    def predicted(self) -> tuple[Int[Tensor, "B W"], Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
        """Return sources, targets and mask; with labels in n more columns."""
        if self.labels is None:
            return self.sources, self.targets, self.mask
        places, ids = self.labels
        shape = len(places), len(ids)
        source = self.sources.gather(1, places.clamp(min=0)[:, None])
        asked = (places != NOWHERE)[:, None]
        return (
            torch.cat([self.sources, source.expand(shape)], dim=1),
            torch.cat([self.targets, ids.expand(shape)], dim=1),
            torch.cat([self.mask, asked.expand(shape)], dim=1),
        )


@dataclass(frozen=True, slots=True)
class RowContents:
    """Contents of a packed row: a prompt, and some or all completions of its group.

    Example: a prompt of 2 tokens whose completions have 2 tokens each; 1 of them is an input.
        >>> fill_rows([2], [2, 2])
        [[RowContents(prompt=0, completions=(0, 1), tokens=4)]]
    """

    prompt: int  # index, 0..Q-1
    completions: tuple[int, ...]  # indices, 0..B-1, ascending
    tokens: int  # inputs: the prompt, and each completion without its last token


def fill_rows(
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    budget: int = 0,
    only: Collection[int] | None = None,
) -> list[list[RowContents]]:
    """Plan batches of rows; a batch is one forward pass of at most `budget` tokens, padding included.

    A group that is too long for the budget is split over rows, and its prompt is computed again in each; this changes
    no result. A completion that is too long alone gets a separate batch. The longest rows come first, so that the
    rows of a batch have similar lengths and little padding.

    prompt_lengths, lengths: tokens of the Q prompts and of the B completions, Q groups of equal size.
    budget: tokens; 0: no limit, one batch.
    only: indices of the completions to include; None: all.
    """
    group_size, rows = len(lengths) // len(prompt_lengths), list[RowContents]()
    for q, prompt in enumerate(prompt_lengths):
        group = [b for b in range(q * group_size, (q + 1) * group_size) if only is None or b in only]
        chosen: list[int] = []
        for b in group:
            if chosen and 0 < budget < prompt + sum(lengths[c] - 1 for c in [*chosen, b]):
                rows.append(_row(q, prompt, chosen, lengths))
                chosen = []
            chosen.append(b)
        if chosen:
            rows.append(_row(q, prompt, chosen, lengths))
    if not budget:
        return [rows] if rows else []
    batches: list[list[RowContents]] = []
    for row in sorted(rows, key=lambda row: -row.tokens):
        if batches and batches[-1][0].tokens * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _row(q: int, prompt: int, chosen: Sequence[int], lengths: Sequence[int]) -> RowContents:
    return RowContents(q, tuple(chosen), prompt + sum(lengths[b] - 1 for b in chosen))


def pack(
    rows: Sequence[RowContents],
    prompts: Sequence[Int[Tensor, " _"]],  # Q, of different lengths
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    *,
    pad_id: int,
    labels: Labels | None = None,
) -> PackedRows:
    """Lay out these rows as tensors; B of the result counts the completions of the rows, in their order.

    completion_mask: True from a completion's first token to its last, without gaps.
    labels: of all B completions.
    """
    chosen = torch.tensor([b for row in rows for b in row.completions], device=completion_ids.device)
    ids, mask = completion_ids[chosen], completion_mask[chosen]
    lengths = iter(mask.sum(dim=1).tolist())
    width = max(row.tokens for row in rows)
    shape, device = (len(rows), width), ids.device

    input_ids = torch.full(shape, pad_id, device=device)
    position_ids = torch.zeros(shape, dtype=torch.long, device=device)
    segments = torch.full(shape, PADDING, device=device)
    sources = torch.zeros_like(ids)
    b = 0
    for r, row in enumerate(rows):
        prompt = prompts[row.prompt].to(device)
        inputs, row_segments, row_positions = [prompt], [PROMPT] * len(prompt), list(range(len(prompt)))
        for k in range(1, len(row.completions) + 1):
            length, first = next(lengths), len(row_segments)
            inputs.append(ids[b, : length - 1])
            row_segments += [k] * (length - 1)
            row_positions += range(len(prompt), len(prompt) + length - 1)
            # Token 0 is predicted by the prompt's last token, token t by token t - 1.
            sources[b, 0] = r * width + len(prompt) - 1
            sources[b, 1:length] = r * width + first + torch.arange(length - 1, device=device)
            b += 1
        input_ids[r, : row.tokens] = torch.cat(inputs)
        position_ids[r, : row.tokens] = torch.tensor(row_positions, device=device)
        segments[r, : row.tokens] = torch.tensor(row_segments, device=device)
    asked = labels and Labels(labels.places[chosen], labels.ids)
    return PackedRows(input_ids, position_ids, segments, sources, ids, mask, asked)


def pack_groups(
    prompts: Sequence[Int[Tensor, " _"]],
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    *,
    pad_id: int,
) -> PackedRows:
    """Pack everything into one batch, one row for each group."""
    (rows,) = fill_rows([len(prompt) for prompt in prompts], completion_mask.sum(dim=1).tolist())
    return pack(rows, prompts, completion_ids, completion_mask, pad_id=pad_id)
