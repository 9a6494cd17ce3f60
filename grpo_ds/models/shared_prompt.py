"""Decoding with shared prompts: a prompt's keys and values are kept once for all completions of its group.

transformers' own cache holds the prompt G times and copies itself for every new token. Here a new token is written in
place, and all queries of a group are multiplied with its prompt together: one product instead of G. The layers are
the model's own, or those of models/fused_layers.py; with a CUDA graph their kernels are launched at once.

Q prompts x G completions, B = Q * G rows, groups side by side.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_ds.models.attention import NOT_MADE_FOR_US, attending, ordinary_ids, use_our_attention
from grpo_ds.models.cuda_graph import graph_pool
from grpo_ds.models.fused_layers import ALIGNED, FusedLayers, queries_per_key
from grpo_ds.models.native_layers import NativeLayers, NativeWeights
from grpo_ds.models.prompt_cache import SharedPromptCache

WIDTH = 64  # columns of the first graph; each next one is twice as wide


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
        fused: bool = False,
        cuda_graphs: bool = False,
        native: NativeWeights | None = None,
    ) -> None:
        """Compute the cache of all prompt tokens but the last, which is the first input of decoding.

        Prompts have at least two tokens. columns: maximum tokens per row. fused: few kernels a layer (`can_fuse`).
        cuda_graphs: launch all kernels of a token at once; on a CPU the same steps run without a graph.
        native: packed weights, to compute a token in one call on a CPU.
        """
        use_our_attention(model)
        self.model, self.cuda_graphs = model, cuda_graphs
        self.align = ALIGNED if fused else 1
        lengths = [len(prompt) - 1 for prompt in prompts]
        width = _round_up(max(lengths), self.align)
        # Padded on the right: causal attention then hides the padding from all real tokens, without a mask.
        ids = torch.tensor([[*prompt[:-1], *[0] * (width - len(prompt) + 1)] for prompt in prompts])
        cache = DynamicCache(config=model.config)
        model.base_model(
            input_ids=ids.to(model.device),
            position_ids=torch.arange(width, device=model.device).expand(len(prompts), -1),
            past_key_values=cache,
            use_cache=True,
        )
        self.cache = SharedPromptCache(
            cache,
            lengths,
            group_size=group_size,
            columns=_round_up(columns, self.align),
            queries=queries_per_key(model) if fused else 0,
        )
        self.keywords = attending(self.cache.attend, model.device)
        self.fused = FusedLayers(model, self.cache) if fused else None
        self.native = NativeLayers(native, self.cache) if native else None
        self.inputs = torch.zeros(2, len(prompts) * group_size, dtype=torch.long, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None  # None: to be captured for these rows and this width
        self.capture = graph_pool(model.device).capture if cuda_graphs and self.inputs.is_cuda else None

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Add `tokens` to the cache and return the logits of the next token, which the next call overwrites."""
        cache = self.cache
        cache.column.fill_(cache.written)
        if self.cuda_graphs:
            logits = self._fixed(tokens, positions)
        else:
            cache.width = _round_up(cache.written + 1, self.align)
            if self.fused:
                cache.hide_unwritten()
            logits = self._forward(tokens, positions)
        cache.written += 1
        return logits

    def keep(self, rows: Int[Tensor, " B"], *, group_size: int) -> None:
        """Keep only these rows."""
        self.graph, self.cache.width = None, 0
        self.cache.keep(rows, group_size=group_size)
        for layers in (self.fused, self.native):
            if layers:
                layers.arrange()

    def restart(self) -> None:
        """Forget all tokens behind the prompts; before any `keep`."""
        self.graph = None  # the first token, which comes again, is decoded without one into another tensor
        self.cache.written = 0  # what stands in the columns is overwritten before it is attended to

    @property
    def group_size(self) -> int:
        return self.cache.group_size

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if layers := self.native or self.fused:
            return layers(tokens, positions)
        return self.model(
            input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False, **self.keywords
        ).logits[:, -1]

    def _fixed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Forward with tensors of fixed size and address, as a graph needs them.

        A graph includes columns that are not written yet (as -inf). When they are full, or the rows change, the next
        graph is captured. The first token is decoded without one, as it may load kernels and choose algorithms.
        """
        cache, rows = self.cache, len(tokens)
        if cache.written >= cache.width:
            self.graph, cache.width = None, _width(cache.written, cache.columns)
        self.inputs[0, :rows] = tokens
        self.inputs[1, :rows] = positions
        if self.capture is None or not cache.written:
            self._fixed_step(rows)
            return self.logits
        self.graph = self.graph or self.capture(lambda: self._fixed_step(rows))
        self.graph.replay()
        return self.logits

    def _fixed_step(self, rows: int) -> None:
        self.cache.hide_unwritten()
        self.logits = self._forward(self.inputs[0, :rows], self.inputs[1, :rows])


def _width(written: int, columns: int) -> int:
    """Columns of a graph for the next token: the smallest WIDTH * 2^i that has room for it, or all."""
    width = WIDTH
    while width <= written:
        width *= 2
    return min(width, columns)


def _round_up(tokens: int, align: int) -> int:
    return -(-tokens // align) * align


# In 16 bits the logits behind a text's first tokens say little: a model gathers activations there that are so large
# that two correct computations round them apart (Qwen2.5-0.5B's by 26 % behind 3 tokens, by 1 % behind 64).
PROBED = 64  # tokens
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # share of the logits' norm


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel, *, fused: bool = False, native: NativeWeights | None = None) -> bool:
    """Test on a short text if `attend`, or the fused or native layers, compute the same logits as the model itself."""
    ids = ordinary_ids(model, PROBED)
    tokens, positions = torch.tensor([ids[-1], len(ids) - 1], device=model.device).split(1)
    try:
        whole = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        ours = SharedPrompts(model, [ids], group_size=1, columns=1, fused=fused, native=native)(tokens, positions)[0]
    except NOT_MADE_FOR_US:
        return False  # not written for transformers' AttentionInterface; others ignore the prompt and fail below
    return bool((ours.float() - whole.float()).norm() <= TOLERANCE.get(model.dtype, 0.05) * whole.float().norm())
