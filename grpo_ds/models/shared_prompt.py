"""Decoding with shared prompts: a prompt's keys and values are kept once for all completions of its group.

transformers' own cache holds the prompt G times and copies itself for every new token. Here a new token is written in
place, and all queries of a group are multiplied with its prompt together: one product instead of G.

Q prompts x G completions, B = Q * G rows, groups side by side; P tokens of the longest prompt, C columns for the tokens
that follow it. H heads of queries, K heads of keys (n = H / K queries share one), of width D.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_ds.models.attention import NOT_MADE_FOR_US, attending, use_our_attention


class SharedPromptCache:
    """Keys and values of every layer: of the prompts [Q K P D], and of each row [B K C D], written token by token."""

    def __init__(self, prompts: DynamicCache, lengths: Sequence[int], *, group_size: int, columns: int) -> None:
        """prompts: the cache after a forward pass over Q prompts padded on the right; lengths: their real tokens."""
        self.group_size = group_size
        layers: Sequence[Any] = prompts.layers
        self.prompts = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in layers]
        self.own = [
            tuple(of.new_zeros(len(of) * group_size, of.shape[1], columns, of.shape[3]) for of in pair)
            for pair in self.prompts
        ]
        first = self.prompts[0][0]
        self.padding: Float[Tensor, "Q 1 1 P"] | None = None  # -inf after a prompt's end; None: all are equally long
        if min(lengths) < first.shape[2]:
            ends = torch.tensor(lengths, device=first.device).view(-1, 1, 1, 1)
            behind = torch.arange(first.shape[2], device=first.device) >= ends
            self.padding = torch.zeros(behind.shape, dtype=first.dtype, device=first.device)
            self.padding.masked_fill_(behind, -torch.inf)
        self.written = 0  # number of columns; a forward pass writes one more
        self.column = torch.zeros(1, dtype=torch.long, device=first.device)  # index of the column that it writes
        self.width = 1  # number of columns that it attends to ...
        self.unwritten: Float[Tensor, " width"] | None = None  # ... these of them are -inf; None: none

    def keep(self, rows: Int[Tensor, " B"], *, group_size: int) -> None:
        """Keep only these rows, in groups of the new size side by side."""
        prompts = rows[::group_size] // self.group_size
        self.own = [(keys[rows], values[rows]) for keys, values in self.own]
        if len(prompts) < len(self.prompts[0][0]):
            self.prompts = [(keys[prompts], values[prompts]) for keys, values in self.prompts]
            self.padding = self.padding if self.padding is None else self.padding[prompts]
        self.group_size = group_size

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Float[Tensor, "B 1 H D"]:
        """Add one token per row, [B H 1 D] and [B K 1 D], and attend to the prompt and to the row's own tokens."""
        prompt_keys, prompt_values = self.prompts[layer]
        for own, new in zip(self.own[layer], (key, value), strict=True):
            own.index_copy_(2, self.column, new)
        own_keys, own_values = (own[:, :, : self.width] for own in self.own[layer])
        (q, k, p, _), (b, heads, _, d) = prompt_keys.shape, query.shape
        g, n = self.group_size, heads // k

        query = (query * scaling).view(b, k, n, d)
        to_prompt = _by_group(query, q, g) @ prompt_keys.mT  # [Q K G*n P]
        if self.padding is not None:
            to_prompt += self.padding
        to_own = _by_group(query @ own_keys.mT, q, g)
        if self.unwritten is not None:
            to_own += self.unwritten
        weights = torch.cat([to_prompt, to_own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        result = _by_row(weights[..., :p] @ prompt_values, g) + _by_row(weights[..., p:], g) @ own_values
        return result.reshape(b, 1, heads, -1)


def _by_group(rows: Float[Tensor, "B K n X"], prompts: int, group_size: int) -> Float[Tensor, "Q K G*n X"]:
    _, k, n, x = rows.shape
    return rows.view(prompts, group_size, k, n, x).transpose(1, 2).reshape(prompts, k, group_size * n, x)


def _by_row(groups: Float[Tensor, "Q K G*n X"], group_size: int) -> Float[Tensor, "B K n X"]:
    q, k, _, x = groups.shape
    return groups.view(q, k, group_size, -1, x).transpose(1, 2).reshape(q * group_size, k, -1, x)


class SharedPrompts:
    """Decode token by token, with each prompt kept once for its group."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        columns: int,
        cuda_graphs: bool = False,
    ) -> None:
        """Compute the cache of all prompt tokens but the last, which is the first input of decoding.

        Prompts have at least two tokens. columns: maximum tokens per row. cuda_graphs: launch all kernels of a
        token at once; with a small model and few rows, launching them one by one takes longer than running them. On a
        CPU the same steps run without a graph.
        """
        use_our_attention(model)
        self.model, self.cuda_graphs = model, cuda_graphs
        lengths = [len(prompt) - 1 for prompt in prompts]
        width = max(lengths)
        # Padded on the right: causal attention then hides the padding from all real tokens, without a mask.
        ids = torch.tensor([[*prompt[:-1], *[0] * (width - len(prompt) + 1)] for prompt in prompts])
        cache = DynamicCache(config=model.config)
        model.base_model(
            input_ids=ids.to(model.device),
            position_ids=torch.arange(width, device=model.device).expand(len(prompts), -1),
            past_key_values=cache,
            use_cache=True,
        )
        self.cache = SharedPromptCache(cache, lengths, group_size=group_size, columns=columns)
        self.keywords = attending(self.cache.attend, model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stale = True  # the graph and its input tensors belong to other rows

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Add `tokens` to the cache and return the logits of the next token, which the next call overwrites."""
        cache = self.cache
        cache.column.fill_(cache.written)
        if self.cuda_graphs:
            logits = self._fixed(tokens, positions)
        else:
            cache.width = cache.written + 1
            logits = self._forward(tokens, positions)
        cache.written += 1
        return logits

    def keep(self, rows: Int[Tensor, " B"], *, group_size: int) -> None:
        """Keep only these rows."""
        self.stale = True
        self.cache.keep(rows, group_size=group_size)

    @property
    def group_size(self) -> int:
        return self.cache.group_size

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False, **self.keywords
        ).logits[:, -1]

    def _fixed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Forward with tensors of fixed size and address, as a graph needs them.

        A graph includes up to WIDTH unwritten columns (as -inf). When they are full, or the rows change, a new graph is
        captured.
        """
        cache = self.cache
        if self.stale or cache.written >= cache.width:
            cache.width = min((cache.written // WIDTH + 1) * WIDTH, cache.own[0][0].shape[2])
            self.tokens, self.positions, self.stale = tokens.clone(), positions.clone(), False
            self.graph = _captured(self._fixed_step) if tokens.is_cuda else None
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        if self.graph:
            self.graph.replay()
        else:
            self._fixed_step()
        return self.logits

    def _fixed_step(self) -> None:
        cache = self.cache
        places = torch.arange(cache.width, device=cache.column.device)
        mask = torch.zeros(cache.width, dtype=cache.prompts[0][0].dtype, device=places.device)
        cache.unwritten = mask.masked_fill_(places > cache.column, -torch.inf)
        self.logits = self._forward(self.tokens, self.positions)


WIDTH = 64  # columns by which a new graph is wider
# Share of the logits' norm. After tokens 1, 2, 3 (special ones, with activations of 25,000) smollm2-135m has 2e-5 in
# fp32, 0.08 in fp16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.15}


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel) -> bool:
    """Test on three tokens if `attend` computes the same attention as the model itself."""
    tokens = torch.tensor([3], device=model.device)
    try:
        whole = model(input_ids=torch.tensor([[1, 2, 3]], device=model.device)).logits[0, -1]
        ours = SharedPrompts(model, [[1, 2, 3]], group_size=1, columns=1)(tokens, tokens - 1)[0]
    except NOT_MADE_FOR_US:
        return False  # not written for transformers' AttentionInterface; others ignore the prompt and fail below
    return bool((ours - whole).float().norm() <= TOLERANCE.get(model.dtype, 0.05) * whole.float().norm())


def _captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture a step as a graph. The step runs twice, which is harmless: it writes the same token in the same place."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # cuBLAS makes its workspaces outside the graph
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
