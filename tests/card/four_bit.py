"""A linear layer in NF4 that needs the memory of bitsandbytes' Linear4bit, without its kernels.

Follows bitsandbytes 0.50.2, autograd/_functions.py (MatMul4Bit) and nn/modules.py: the weight is converted for each
product, forward and backward; peft clones the result (tuners/lora/bnb.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.card.recorder import CARD

BLOCK, NESTED = 64, 256  # weights that share a scale; scales that share a scale


class FourBitLinear(nn.Linear):
    """Codes of two weights a byte, a scale of one byte for 64 weights, an fp32 scale for 256 of those."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        count = linear.weight.numel()
        codes = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=CARD)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", torch.empty(-(-count // BLOCK), dtype=torch.uint8, device=CARD))
        self.register_buffer("nested", torch.empty(-(-count // (BLOCK * NESTED)), device=CARD))

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self).clone()

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        self.absmax.to(torch.float32)
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=CARD)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantised(ctx.dtype), None
