"""Weight-only int8 layers: one byte a weight, a scale per group, products in the activations' dtype.

Rows are cut into groups of at most GROUP input features; each group is scaled by its largest absolute
value. Activations stay as they are, which is why the KL floor is a sixth of LLM.int8's, which rounds
both. Weights become bf16 again one layer at a time, for as long as its matmul takes.
"""

import math

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

GROUP = 64  # divides every hidden size in use; 128 saves 1.5 % of the memory and raises the floor
MIN_GROUP = 16  # odd widths: below this the scales would cost more than they save


def quantize(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """Symmetric int8 with a scale per group of inputs, in the weight's dtype.

    The codes are rounded against the scale as it is stored, so its own rounding adds no error.
    """
    out_features, in_features = weight.shape
    group = math.gcd(in_features, GROUP)
    grouped = weight.detach().float().view(out_features, -1, group if group >= MIN_GROUP else in_features)
    scale = (grouped.abs().amax(dim=2) / 127).to(weight.dtype)
    step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = (grouped / step).round_().clamp_(-127, 127).to(torch.int8)
    return codes.view(out_features, in_features), scale


def dequantize(codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
    """codes * scale in the scale's dtype (an int8 code is exact in bf16)."""
    grouped = codes.view(*scale.shape, -1).to(scale.dtype)
    return grouped.mul_(scale[..., None]).view(codes.shape)


class Int8Rows(nn.Module):
    """A frozen weight [out, in] in int8 that hands out its rows, so that a head is never whole in 16 bits."""

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
