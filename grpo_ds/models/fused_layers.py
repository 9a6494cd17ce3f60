"""Decode one token of Llama, Qwen2 or Qwen3 in few kernels: about 20 a layer instead of transformers' 54.

With few rows a layer's products take a few microseconds, and launching a kernel takes as long. So norms are one kernel,
the rotary embedding is one product of queries and keys with a rotation matrix, keys, values and queries are stored
by one kernel, residual sums are part of products, and gate and up are one product where their weights are adjacent,
as in ZeRO's flat buffer.

Letters as in models/prompt_cache.py: Q prompts, G rows each, B = Q * G; K heads of keys, n queries for each, width D.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_ds.models.prompt_cache import SharedPromptCache

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # cosines depend on the position alone, not on the longest one
ALIGNED = 8  # tokens: on a card products are slower if the rows of a matrix do not begin at multiples of 16 bytes


def can_fuse(model: PreTrainedModel) -> bool:
    """Return True if every module of the model computes what FusedLayers computes: no adapters, no packed weights."""
    own = type(model).__module__
    known = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)
    unchanged = all(
        (type(module) in known or type(module).__module__ == own or type(module).__name__ == "SiLUActivation")
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in model.modules()
    )
    same_type = len({parameter.dtype for parameter in model.parameters()}) == 1
    return _known(model) and unchanged and same_type and model.config.hidden_act == "silu"


def _known(model: PreTrainedModel) -> bool:
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    ours = type(model).__name__ in MODELS and type(model).__module__.startswith("transformers.models.")
    return ours and rope in ROPE_TYPES


def can_capture(model: PreTrainedModel) -> bool:
    """Return True if the model's own layers, with or without LoRA, work in a CUDA graph: nothing waits for the card."""
    bitsandbytes = any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
    return _known(model) and not bitsandbytes


def queries_per_key(model: PreTrainedModel) -> int:
    """n: number of query heads that share a head of keys."""
    return model.config.num_attention_heads // model.config.num_key_value_heads


@dataclass(slots=True)
class Arrangement:
    """Indices of Q prompts and G rows each; they change only with Q and G."""

    turns: Int[Tensor, " Q*(n+1)"]  # row whose position turns each block of G*K queries or keys
    places: Int[Tensor, " B*(H+2K)"]  # row in a pool of each query, key and value, for column 0
    step: Int[Tensor, " B*(H+2K)"]  # 1: the row moves with the column; 0: a query


class FusedLayers:
    """Logits of one token per row; keys and values are added to the cache."""

    def __init__(self, model: PreTrainedModel, cache: SharedPromptCache) -> None:
        self.cache = cache
        self.base = cast(Any, model.base_model)
        self.head: nn.Linear = model.get_output_embeddings()
        self.n = queries_per_key(model)
        self.products = [_gate_and_up(layer.mlp) for layer in self.base.layers]
        d = cache.shape[4]
        turned = torch.eye(d).roll(d // 2, dims=1)  # x @ turned is transformers' rotate_half(x)
        turned[d // 2 :] *= -1
        like = self.head.weight
        self.eye, self.half = torch.eye(d).to(like), turned.to(like)
        self.arrange()

    def arrange(self) -> None:
        """Make the indices for the rows that the cache holds now."""
        (q, k, g, _, _), n = self.cache.shape, self.n
        first = torch.arange(q) * g
        turns = torch.cat([first.repeat_interleave(n), first])
        groups = torch.arange(q * k * g).view(q, k, g).transpose(1, 2).flatten()  # row b and head k -> place
        queries = (groups[:, None] * n + torch.arange(n)).flatten()
        own = [start + groups * self.cache.columns for start in self.cache.starts]
        step = torch.cat([torch.zeros_like(queries), torch.ones_like(own[0]), torch.ones_like(own[1])])
        device = self.cache.column.device
        self.rows = Arrangement(turns.to(device), torch.cat([queries, *own]).to(device), step.to(device))
        self.scales = [self._scale(layer.self_attn) for layer in self.base.layers]

    def __call__(self, tokens: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Rows of a group are at one position."""
        cache, hidden = self.cache, F.embedding(tokens, self.base.embed_tokens.weight)
        cos, sin = self.base.rotary_emb(hidden, positions[self.rows.turns][:, None])
        self.rotation = torch.addcmul(self.eye * cos, self.half, sin)  # [Q*(n+1) D D]
        self.places = torch.addcmul(self.rows.places, self.rows.step, cache.column)
        self.mask = self._mask()
        for index, layer in enumerate(self.base.layers):
            self._attention(index, layer.self_attn, _norm(layer.input_layernorm, hidden), hidden)
            self._mlp(index, layer.mlp, _norm(layer.post_attention_layernorm, hidden), hidden)
        return F.linear(_norm(self.base.norm, hidden), self.head.weight, self.head.bias)

    def _mask(self) -> Float[Tensor, "Q 1 P+W"]:
        """-inf where a prompt is padded and where a column is not written yet."""
        (q, _, _, p, _), unwritten = self.cache.shape, self.cache.unwritten
        assert unwritten is not None
        padding = self.eye.new_zeros(q, p) if self.cache.padding is None else self.cache.padding.view(q, p)
        return torch.cat([padding, unwritten.expand(q, -1)], dim=1)[:, None]

    def _attention(self, index: int, attention: Any, x: Tensor, hidden: Tensor) -> None:
        """Add a layer's attention to `hidden`."""
        queries = self._store(index, attention, x)
        scores = self._scores(index, queries, attention.scaling)
        (q, k, g, p, d), n = self.cache.shape, self.n
        weights = scores.softmax(dim=-1)
        _, values = (of.flatten(0, 1) for of in self.cache.prompts[index])
        _, own_values = self._own(index)
        result = torch.bmm(weights[..., :p], values).view(q * k * g, n, d)
        result.baddbmm_(weights.view(q * k * g, n, -1)[..., p:], own_values)
        _add_product(attention.o_proj, result.view(q, k, g, n * d).transpose(1, 2).reshape(q * g, -1), hidden)

    def _store(self, index: int, attention: Any, x: Tensor) -> Float[Tensor, "Q*K*G*n D"]:
        """Store a layer's new keys and values in the cache; return the queries, by group and head as they are there."""
        (q, k, g, _, d), n = self.cache.shape, self.n
        rows = q * g
        raw, new = (x.new_empty(rows * heads, d) for heads in ((n + 1) * k, (n + 2) * k))
        _product(attention.q_proj, x, raw[: rows * n * k])
        _product(attention.k_proj, x, raw[rows * n * k :])
        _product(attention.v_proj, x, new[len(raw) :])
        blocks = raw.view(q * (n + 1), g * k, d)
        if (scale := self.scales[index]) is not None:
            blocks = F.rms_norm(blocks, (d,), None, attention.q_norm.variance_epsilon).mul_(scale)
        torch.bmm(blocks, self.rotation, out=new[: len(raw)].view(blocks.shape))
        return self.cache.pools[index].index_copy_(0, self.places, new)[: rows * n * k]

    def _scores(self, index: int, queries: Tensor, scaling: float) -> Float[Tensor, "Q*K G*n P+W"]:
        """Scores of the prompt and of the rows' own columns, side by side."""
        (q, k, g, p, d), n = self.cache.shape, self.n
        keys, _ = (of.flatten(0, 1) for of in self.cache.prompts[index])
        own_keys, _ = self._own(index)
        scores = queries.new_empty(q * k, g * n, p + self.cache.width)
        _scaled_product(queries.view(q * k, g * n, d), keys.mT, scaling, scores[..., :p])
        _scaled_product(queries.view(q * k * g, n, d), own_keys.mT, scaling, scores.view(q * k * g, n, -1)[..., p:])
        scores.view(q, k * g * n, -1).add_(self.mask)
        return scores

    def _own(self, index: int) -> tuple[Float[Tensor, "Q*K*G W D"], Float[Tensor, "Q*K*G W D"]]:
        keys, values = (of.flatten(0, 2)[:, : self.cache.width] for of in self.cache.own(index))
        return keys, values

    def _mlp(self, index: int, mlp: Any, x: Tensor, hidden: Tensor) -> None:
        """Add a layer's MLP to `hidden`."""
        if (both := self.products[index]) is not None:
            gate, up = (x @ both.t()).chunk(2, dim=1)
        else:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        _add_product(mlp.down_proj, F.silu(gate).mul_(up), hidden)

    def _scale(self, attention: Any) -> Float[Tensor, "Q*(n+1) 1 D"] | None:
        """Weights of Qwen3's norms for each block of queries or keys."""
        if not hasattr(attention, "q_norm"):
            return None
        q = self.cache.shape[0]
        queries, keys = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
        return torch.cat([queries.expand(q * self.n, -1), keys.expand(q, -1)])[:, None]


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _product(layer: nn.Linear, x: Float[Tensor, "B X"], out: Float[Tensor, "rows D"]) -> None:
    """Write layer(x) to contiguous memory, where cuBLAS adds the bias itself."""
    out = out.view(len(x), -1)
    if layer.bias is None:
        torch.mm(x, layer.weight.t(), out=out)
    else:
        torch.addmm(layer.bias, x, layer.weight.t(), out=out)


def _add_product(layer: nn.Linear, x: Tensor, hidden: Tensor) -> None:
    """Add layer(x) to `hidden` in place."""
    hidden.addmm_(x, layer.weight.t())
    if layer.bias is not None:
        hidden.add_(layer.bias)


def _scaled_product(a: Tensor, b: Tensor, scaling: float, out: Tensor) -> None:
    torch.baddbmm(out, a, b, beta=0, alpha=scaling, out=out)


def _gate_and_up(mlp: Any) -> Tensor | None:
    """One view of both weights, if they are neighbours in memory and have no biases; None otherwise."""
    gate, up = mlp.gate_proj, mlp.up_proj
    first, second = gate.weight.detach(), up.weight.detach()
    if gate.bias is not None or up.bias is not None or not (first.is_contiguous() and second.is_contiguous()):
        return None
    one_buffer = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if not one_buffer or second.storage_offset() != first.storage_offset() + first.numel():
        return None
    return first.as_strided((2 * len(first), first.shape[1]), (first.shape[1], 1))
