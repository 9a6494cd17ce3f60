"""Packed rows: a prompt is computed once and its G completions see it, but not each other.

A row is [prompt | c1 | ... | cG | padding]. Position ids restart after the prompt for every
completion, and the mask lets a token see the prompt and the tokens before it in its own completion:
each completion gets exactly the hidden states it would get alone behind the prompt.
The last token of a completion predicts nothing that is trained, so it is a target but no input.

A group may be split over several rows, each with the prompt.

Q prompts; R rows, L tokens in the longest row; B completions, C tokens in the longest.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PROMPT, PADDING = 0, -1  # segment numbers; completion k of a row is segment k, from 1


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Groups laid out for one forward pass, and where each completion token is predicted."""

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    segments: Int[Tensor, "R L"]  # PROMPT, 1..G, or PADDING
    sources: Int[Tensor, "B C"]  # flat index into R * L of the token that predicts; 0 where mask is False
    targets: Int[Tensor, "B C"]
    mask: Bool[Tensor, "B C"]  # True counts

    def to(self, device: torch.device) -> "PackedRows":
        """The same rows on another device."""
        return PackedRows(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class RowContents:
    """What a packed row holds: a prompt, and some or all of its group's completions."""

    prompt: int  # 0..Q-1
    completions: tuple[int, ...]  # of the B, in order
    tokens: int  # inputs: the prompt, and each completion but for its last token


def fill_rows(
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    budget: int = 0,
    only: Collection[int] | None = None,
) -> list[list[RowContents]]:
    """Batches of rows, each to be packed and computed at once: at most `budget` tokens with their padding; 0: all.

    A group too long for the budget is split over rows, which changes no result: its prompt is then computed once for
    each. Where even one completion is too long, it has a batch to itself. Longest rows first, so that little is
    padded. `only`: the completions that take part.
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
    prompts: Sequence[Int[Tensor, " _"]],  # Q, each of its own length
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    *,
    pad_id: int,
) -> PackedRows:
    """The rows side by side; their completions, one after the other, are the B of the result.

    A completion's mask is True from its first token to its last, without holes.
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
    return PackedRows(input_ids, position_ids, segments, sources, ids, mask)


def pack_groups(
    prompts: Sequence[Int[Tensor, " _"]],
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    *,
    pad_id: int,
) -> PackedRows:
    """All of it at once, a row a group."""
    (rows,) = fill_rows([len(prompt) for prompt in prompts], completion_mask.sum(dim=1).tolist())
    return pack(rows, prompts, completion_ids, completion_mask, pad_id=pad_id)
