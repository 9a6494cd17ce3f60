"""Linear layers for few rows on a CPU: weights stored once in oneDNN's own layout.

torch's matmul converts a weight to that layout at every call; for the 8 rows of a decoding step this takes as long as
the product. `packed_linears` converts each weight once per rollout, and keeps a second copy of the weights meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 8  # the layout is chosen for this number of rows; others work too


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Run a model's linear layers on the CPU with packed copies of their weights; other layers stay unchanged.

    fp32, and bf16 where the processor computes in it. The weights must not change meanwhile. Works without gradients
    only.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _packable(m.weight)]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TYPICAL_ROWS)
        layer.forward = partial(_linear, packed, layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    in_bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or in_bf16


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
