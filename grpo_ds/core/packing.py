"""Packed rows: a group's prompt is computed once and its G completions see it, but not each other.

A row is [prompt | c1 | ... | cG | padding]. Position ids restart after the prompt for every
completion, and the mask lets a token see the prompt and the tokens before it in its own completion:
each completion gets exactly the hidden states it would get alone behind the prompt.
The last token of a completion predicts nothing that is trained, so it is a target but no input.

R rows (one a group), L tokens in the longest row, B = R * G completions, C tokens in the longest.
"""

from collections.abc import Sequence
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

    def attention_mask(self) -> Bool[Tensor, "R 1 L L"]:
        """True where a query (dim 2) may see a key (dim 3); every query sees itself, so no row is empty."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(self.segments.shape[1], self.segments.shape[1], dtype=torch.bool, device=query.device)
        return (((key == query) | (key == PROMPT)) & causal.tril()).unsqueeze(1)


def pack(
    prompts: Sequence[Int[Tensor, " _"]],  # each of its own length
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    *,
    pad_id: int,
) -> PackedRows:
    """One row a prompt; B must be a multiple of the number of prompts, groups in order of the prompts.

    A completion's mask is True from its first token to its last, without holes.
    """
    group_size = len(completion_ids) // len(prompts)
    lengths = completion_mask.sum(dim=1).view(-1, group_size).tolist()
    layouts = [_layout(len(prompt), row_lengths) for prompt, row_lengths in zip(prompts, lengths, strict=True)]
    width = max(len(segments) for segments, _, _ in layouts)
    shape, device = (len(prompts), width), completion_ids.device

    input_ids = torch.full(shape, pad_id, device=device)
    position_ids = torch.zeros(shape, dtype=torch.long, device=device)
    segments = torch.full(shape, PADDING, device=device)
    sources = torch.zeros_like(completion_ids)
    for r, (prompt, (row_segments, row_positions, firsts)) in enumerate(zip(prompts, layouts, strict=True)):
        inputs = [prompt.to(device)]
        for k, (first, length) in enumerate(zip(firsts, lengths[r], strict=True)):
            b = r * group_size + k
            inputs.append(completion_ids[b, : length - 1])
            # Token 0 is predicted by the prompt's last token, token t by token t - 1.
            sources[b, 0] = r * width + len(prompt) - 1
            sources[b, 1:length] = r * width + first + torch.arange(length - 1, device=device)
        used = len(row_segments)
        input_ids[r, :used] = torch.cat(inputs)
        position_ids[r, :used] = torch.tensor(row_positions, device=device)
        segments[r, :used] = torch.tensor(row_segments, device=device)
    return PackedRows(input_ids, position_ids, segments, sources, completion_ids, completion_mask)


def _layout(prompt_length: int, lengths: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Segment and position of every input token of a row, and where each completion's inputs start."""
    segments, positions, firsts = [PROMPT] * prompt_length, list(range(prompt_length)), []
    for k, length in enumerate(lengths, start=1):
        firsts.append(len(segments))
        segments += [k] * (length - 1)
        positions += range(prompt_length, prompt_length + length - 1)
    return segments, positions, firsts
