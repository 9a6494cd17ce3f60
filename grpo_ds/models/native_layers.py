"""Decode one token of Llama, Qwen2 or Qwen3 on a CPU in one call: decode.cpp, compiled at first use.

On a CPU with bf16 a product of 8 rows is as fast as memory once its weight is packed; what is left is small kernels,
fifty a layer, and attention in ten of them. Here a token is one parallel region. Sums and the residual stream are fp32,
so logits are nearer to the exact ones than those of torch's layers, which round every result to bf16.
"""

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_ds.models.fused_layers import can_fuse, queries_per_key
from grpo_ds.models.prompt_cache import SharedPromptCache
from grpo_ds.system.compiled import build, reason

NAME = "grpo_ds_decode"
SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
LANES = 16  # outputs in a vector
TILE = 2 * LANES  # outputs that are computed together
MOST_QUERIES = 16  # that share a head of keys

logger = logging.getLogger(__name__)


class _Weight(ctypes.Structure):
    """struct Weight of decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


class _Layer(ctypes.Structure):
    """struct Layer of decode.cpp."""

    _fields_ = [
        *((name, _Weight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "second_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("prompt_keys", "prompt_values", "own_keys", "own_values")),
    ]


class _Token(ctypes.Structure):
    """struct Token of decode.cpp."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Weight),
        *((name, ctypes.c_void_p) for name in ("last_norm", "cos", "sin", "prompt_lengths")),
        *((name, ctypes.c_void_p) for name in ("hidden", "raw", "logits", "x", "heads", "gated", "scores")),
        *((name, ctypes.c_int32) for name in ("count", "width", "mlp", "q", "g", "k", "n", "d", "p", "c")),
        *((name, ctypes.c_int32) for name in ("written", "threads")),
        *((name, ctypes.c_float) for name in ("eps", "scaling")),
    ]


def can_decode_natively(model: PreTrainedModel) -> bool:
    """Return True for a bf16 model on a CPU that computes in bf16, of a kind and of sizes that decode.cpp computes."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not can_fuse(model):
        return False
    layer = cast(Any, model.base_model).layers[0]
    sizes = (model.config.hidden_size, layer.self_attn.head_dim, layer.mlp.gate_proj.out_features)
    fits = all(size % LANES == 0 for size in sizes) and queries_per_key(model) <= MOST_QUERIES
    return fits and (kernel := library()) is not None and bool(kernel.grpo_ds_can_decode())


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None (with one warning and the reason) if this machine cannot build it."""
    try:
        return ctypes.CDLL(str(build(NAME, SOURCE, FLAGS)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("Sampling on the CPU runs on torch's slower layers: %s", reason(error))
        return None


class NativeWeights:
    """Packed copies of a model's weights; the model's must not change while they are used."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.kept: list[Tensor] = []  # what C++ reads
        base = cast(Any, model.base_model)
        self.layers = [self._layer(layer) for layer in base.layers]
        self.head = self._packed(cast(nn.Linear, model.get_output_embeddings()))
        self.last_norm = self._floats(base.norm.weight)

    def _layer(self, layer: Any) -> dict[str, Any]:
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "qkv": self._packed(attention.q_proj, attention.k_proj, attention.v_proj),
            "out": self._packed(attention.o_proj),
            "gate_up": self._packed(mlp.gate_proj, mlp.up_proj, in_turn=True),
            "down": self._packed(mlp.down_proj),
            "norm": self._floats(layer.input_layernorm.weight),
            "second_norm": self._floats(layer.post_attention_layernorm.weight),
        }
        if hasattr(attention, "q_norm"):
            parts["query_norm"], parts["key_norm"] = map(
                self._floats, (attention.q_norm.weight, attention.k_norm.weight)
            )
        return parts

    def _packed(self, *layers: nn.Linear, in_turn: bool = False) -> _Weight:
        """Pack the outputs of these layers behind each other, or LANES of each in turn."""
        weight = _joined([layer.weight for layer in layers], in_turn)
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, 0, 0, -outputs % TILE))
        tiles = padded.view(-1, 2, LANES, inputs // 2, 2).permute(0, 3, 1, 2, 4).contiguous()
        self.kept.append(tiles)
        bias = None
        if layers[0].bias is not None:
            bias = self._floats(F.pad(_joined([layer.bias for layer in layers], in_turn), (0, -outputs % TILE)))
        return _Weight(data=tiles.data_ptr(), bias=bias, inputs=inputs, outputs=outputs)

    def _floats(self, values: Tensor) -> int:
        self.kept.append(values.detach().float().contiguous())
        return self.kept[-1].data_ptr()


def _joined(parts: list[Tensor], in_turn: bool) -> Tensor:
    if not in_turn:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (-1, LANES)) for part in parts], dim=1).flatten(0, 2)


class NativeLayers:
    """Logits of one token per row; keys and values are added to the cache."""

    def __init__(self, weights: NativeWeights, cache: SharedPromptCache) -> None:
        self.weights, self.cache, self.base = weights, cache, cast(Any, weights.model.base_model)
        self.arrange()

    def arrange(self) -> None:
        """Make the buffers for the rows that the cache holds now."""
        (q, k, g, p, d), cache, weights = self.cache.shape, self.cache, self.weights
        n, rows = queries_per_key(weights.model), q * g
        width, mlp = self.base.config.hidden_size, weights.layers[0]["down"].inputs
        attention, threads = self.base.layers[0].self_attn, torch.get_num_threads()
        self.lengths = torch.tensor(cache.lengths)
        self.raw = torch.empty(rows, (n + 2) * k * d)
        self.logits = torch.empty(rows, weights.head.outputs)
        self.x, self.heads, self.gated = (
            torch.empty(rows, size, dtype=torch.bfloat16) for size in (width, n * k * d, mlp)
        )
        self.scores = torch.empty(threads, n, p + cache.columns)
        buffers = ("raw", "logits", "x", "heads", "gated", "scores")
        self.layers = (_Layer * len(weights.layers))(*map(self._layer, range(len(weights.layers))))
        self.token = _Token(
            layers=self.layers,
            head=weights.head,
            last_norm=weights.last_norm,
            prompt_lengths=self.lengths.data_ptr(),
            **{name: getattr(self, name).data_ptr() for name in buffers},
            **dict(zip("qgkndpc", (q, g, k, n, d, p, cache.columns), strict=True)),
            count=len(self.layers),
            width=width,
            mlp=mlp,
            threads=threads,
            eps=self.base.norm.variance_epsilon,
            scaling=attention.scaling,
        )

    def __call__(self, tokens: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        embedded = F.embedding(tokens, self.base.embed_tokens.weight)
        # In bf16, as the model's own layers have them.
        cos, sin = (of.float().contiguous() for of in self.base.rotary_emb(embedded, positions[:, None]))
        hidden = embedded.float()
        self.token.hidden, self.token.cos, self.token.sin = hidden.data_ptr(), cos.data_ptr(), sin.data_ptr()
        self.token.written = self.cache.written
        kernel = library()
        assert kernel is not None, "callers ask can_decode_natively first"
        kernel.grpo_ds_decode(ctypes.byref(self.token))
        return self.logits

    def _layer(self, index: int) -> _Layer:
        prompts = dict(zip(("prompt_keys", "prompt_values"), self.cache.prompts[index], strict=True))
        own = dict(zip(("own_keys", "own_values"), self.cache.own(index), strict=True))
        return _Layer(**self.weights.layers[index], **{name: of.data_ptr() for name, of in (prompts | own).items()})
