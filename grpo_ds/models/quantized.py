"""Weight-only int8 layers: one byte per weight, a scale per group, products in the activations' dtype.

Rows are cut into groups of at most SCALE_GROUP input features (models/shapes.py); each group is scaled by its largest
absolute value. Activations are not rounded, so the KL floor is a sixth of LLM.int8's, which rounds both. Weights are
converted to bf16 one layer at a time, only for its matmul.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from grpo_ds.models.shapes import scale_group


def quantize(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """Round to symmetric int8 codes with a scale per group of inputs, in the weight's dtype.

    The codes are computed with the scale as it is stored, so rounding the scale adds no error.
    """
    out_features, in_features = weight.shape
    grouped = weight.detach().float().view(out_features, -1, scale_group(in_features))
    scale = (grouped.abs().amax(dim=2) / 127).to(weight.dtype)
    step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = (grouped / step).round_().clamp_(-127, 127).to(torch.int8)
    return codes.view(out_features, in_features), scale


def dequantize(codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
    """Return codes * scale in the scale's dtype (an int8 code is exact in bf16)."""
    grouped = codes.view(*scale.shape, -1).to(scale.dtype)
    return grouped.mul_(scale[..., None]).view(codes.shape)


class Int8Rows(nn.Module):
    """A frozen weight [out, in] in int8 that dequantises a few rows at a time: a 16-bit copy never exists."""

    codes: Tensor  # int8
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        codes, scale = quantize(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return dequantize(self.codes[rows], self.scale[rows])


class Int8Linear(Int8Rows):
    """A frozen nn.Linear kept in int8."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__(weight)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self[:], self.bias)


class Int8Embedding(Int8Rows):
    """A frozen nn.Embedding kept in int8."""

    def forward(self, ids: Tensor) -> Tensor:
        return self[ids.flatten()].view(*ids.shape, -1)
