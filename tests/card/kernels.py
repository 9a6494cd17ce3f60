"""Which kernel a card of the RTX 30 and 40 series takes for attention, and the memory that kernels use inside.

Read in torch 2.13: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (the choice), attention.cu and
attention_backward.cu with mem_eff_attention/kernel_backward.h and flash_attn/flash_api.cpp (workspaces).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MASK_ALIGNMENT = 8  # elements: memory-efficient attention copies a mask whose rows begin elsewhere
FP32 = 4
MULTIPROCESSORS = 128  # of an RTX 4090, which has the most of its series


def choice(query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool) -> str:
    """Return the kernel: flash takes no mask and 16 bits only, memory-efficient no shared keys, math anything."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and mask is None and query.shape[-1] <= 256 and (not causal or query.shape[2] == key.shape[2]):
        return "flash"
    if query.shape[1] == key.shape[1] and query.shape[2] and key.shape[2]:
        return "efficient"
    return "math"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by the kernel of `choice`."""
    assert not dropout_p, "dropout would add a mask"
    kernel = choice(query, key, attn_mask, causal=is_causal)
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    if kernel == "math":
        more = {"scale": scale, "enable_gqa": enable_gqa}
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, 0.0, is_causal, **more)[0]
    bias = None if attn_mask is None else _expanded(attn_mask, query, key)
    trains = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, trains, 0.0, is_causal, scale=scale)[0]


def _expanded(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Make a mask additive and aligned; the kernel reads it through strides, so it is not repeated."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    if any(stride % MASK_ALIGNMENT for stride in mask.stride()[:-1]):
        width = mask.shape[-1]
        mask = torch.nn.functional.pad(mask, (0, -width % MASK_ALIGNMENT))[..., :width]
    return mask.expand(*query.shape[:3], key.shape[2])


def _blocks(count: int, size: int) -> int:
    return -(-count // size) * size


def efficient_backward(gradient: Tensor, query: Tensor, *_: Any, **options: Any) -> list[int]:
    """Bytes: an fp32 sum of the query's gradient in tiles of 64 rows, delta, and a copy of a strided gradient."""
    batch, heads, rows, width = query.shape
    tile_width = 64 if width <= 64 else 128
    sums = batch * heads * _blocks(rows, 64) * _blocks(width, tile_width) * FP32
    copied = 0 if gradient.transpose(1, 2).is_contiguous() else gradient.nbytes
    return [sums, batch * heads * rows * FP32, *([copied] if copied else [])]


def flash_backward(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **options: Any) -> list[int]:
    """Bytes: an fp32 sum of the query's gradient, its softmax's row sums, and for shared keys one gradient a head.

    In a fixed order there is a sum for each of the blocks that run at the same time.
    """
    batch, heads, rows, width = query.shape
    padded, sums = _blocks(rows, 128), -(-MULTIPROCESSORS // (batch * heads))
    sizes = [batch * heads * padded * FP32, sums * batch * heads * padded * _blocks(width, 32) * FP32]
    if key.shape[1] != heads:
        sizes += [batch * key.shape[2] * heads * width * key.element_size()] * 2
    if not gradient.transpose(1, 2).is_contiguous():
        sizes.append(gradient.nbytes)
    return sizes


def embedding_backward(gradient: Tensor, indices: Tensor, *_: Any, **options: Any) -> list[int]:
    """Bytes: the indices and their positions, sorted, with the sort's own copy of both."""
    return [indices.numel() * 8] * 4


def cumulative_sum(tensor: Tensor, _: int, *, dtype: torch.dtype | None = None) -> list[int]:
    """Bytes: the tensor in the sum's precision."""
    return [tensor.numel() * dtype.itemsize] if dtype not in (None, tensor.dtype) else []


WORKSPACES: dict[Any, Callable[..., list[int]]] = {
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten.embedding_dense_backward.default: embedding_backward,
    aten.cumsum.default: cumulative_sum,
}
