"""Keys and values of decoding: of each prompt once for its group, of each row token by token in their place.

Q prompts x G completions, B = Q * G rows; P tokens of the longest prompt, C columns for the tokens that follow it.
H heads of queries, K heads of keys (n = H / K queries share one), of width D. Rows are stored by group and head,
[Q K G], so that all queries of a group that share a head are one matrix for the product with their prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache


class SharedPromptCache:
    """Keys and values of every layer: of the prompts [Q K P D], and of each row [Q K G C D].

    Buffers never move: rows that stay are copied to the front of the same memory, as a CUDA graph needs it.
    """

    def __init__(
        self, prompts: DynamicCache, lengths: Sequence[int], *, group_size: int, columns: int, queries: int = 0
    ) -> None:
        """prompts: the cache after a forward pass over Q prompts padded on the right; lengths: their real tokens.

        queries: n, to reserve room for the queries of one token before the keys of `pools`; 0 for no such room.
        """
        layers: Sequence[Any] = prompts.layers
        self.prompts = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in layers]
        first = self.prompts[0][0]
        q, k, p, d = first.shape
        self.group_size, self.columns, self.lengths = group_size, columns, list(lengths)
        places = q * k * group_size
        self.starts = places * queries, places * (queries + columns)  # of keys and values in a pool
        self.pools: list[Float[Tensor, "rows D"]] = [
            keys.new_zeros(places * (queries + 2 * columns), d) for keys, _ in self.prompts
        ]
        self.padding: Float[Tensor, "Q 1 1 P"] | None = None  # -inf after a prompt's end; None: all are equally long
        if min(lengths) < p:
            behind = torch.arange(p, device=first.device) >= torch.tensor(lengths, device=first.device)[:, None]
            self.padding = first.new_zeros(q, 1, 1, p).masked_fill_(behind[:, None, None], -torch.inf)
        self.written = 0  # number of columns; a forward pass writes one more
        self.column = torch.zeros(1, dtype=torch.long, device=first.device)  # index of the column that it writes
        self.width = 0  # number of columns that it attends to ...
        self.unwritten: Float[Tensor, " width"] | None = None  # ... these of them are -inf; None: none

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Q, K, G, P, D."""
        q, k, p, d = self.prompts[0][0].shape
        return q, k, self.group_size, p, d

    def own(self, layer: int) -> tuple[Float[Tensor, "Q K G C D"], Float[Tensor, "Q K G C D"]]:
        """Keys and values of the rows' own tokens in a layer."""
        q, k, g, _, d = self.shape
        rows = q * k * g * self.columns
        keys, values = (self.pools[layer].narrow(0, start, rows).view(q, k, g, -1, d) for start in self.starts)
        return keys, values

    def keep(self, rows: Int[Tensor, " B"], *, group_size: int) -> None:
        """Keep only these rows, in groups of the new size side by side."""
        prompts = rows[::group_size] // self.group_size
        in_group = (rows % self.group_size).view(-1, group_size)
        for layer in range(len(self.pools)):
            own = [of[prompts[:, None], :, in_group].transpose(1, 2) for of in self.own(layer)]  # copies
            for start, of in zip(self.starts, own, strict=True):
                self.pools[layer].narrow(0, start, of.shape[:4].numel()).view(of.shape).copy_(of)
        if len(prompts) < len(self.prompts[0][0]):
            self.prompts = [(_to_front(keys, prompts), _to_front(values, prompts)) for keys, values in self.prompts]
            self.padding = self.padding if self.padding is None else _to_front(self.padding, prompts)
        self.group_size, self.lengths = group_size, [self.lengths[q] for q in prompts.tolist()]

    def hide_unwritten(self) -> None:
        """Let a forward pass attend to none of its `width` columns that are not written yet."""
        places = torch.arange(self.width, device=self.column.device)
        self.unwritten = self.pools[0].new_zeros(self.width).masked_fill_(places > self.column, -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Float[Tensor, "B 1 H D"]:
        """Add one token per row, [B H 1 D] and [B K 1 D], and attend to the prompt and to the row's own tokens."""
        q, k, g, p, d = self.shape
        for own, new in zip(self.own(layer), (key, value), strict=True):
            own.index_copy_(3, self.column, new.view(q, g, k, 1, d).transpose(1, 2))
        own_keys, own_values = (own[:, :, :, : self.width] for own in self.own(layer))
        prompt_keys, prompt_values = self.prompts[layer]

        grouped = (query * scaling).view(q, g, k, -1, d).transpose(1, 2).contiguous()  # [Q K G n D]
        to_prompt = grouped.flatten(2, 3) @ prompt_keys.mT  # [Q K G*n P]
        if self.padding is not None:
            to_prompt += self.padding
        to_own = (grouped @ own_keys.mT).flatten(2, 3)
        if self.unwritten is not None:
            to_own += self.unwritten
        weights = torch.cat([to_prompt, to_own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        result = (weights[..., :p] @ prompt_values).view(grouped.shape)
        result = result + weights[..., p:].unflatten(2, (g, -1)) @ own_values
        return result.transpose(1, 2).reshape(q * g, 1, -1, d)


def _to_front(of: Tensor, chosen: Int[Tensor, " Q"]) -> Tensor:
    """Copy the chosen entries of a tensor to its beginning; return the view of them."""
    front = of[: len(chosen)]
    return front.copy_(of[chosen])
