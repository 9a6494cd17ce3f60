"""Which kernel PyTorch's attention chooses, seen from the calls themselves."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode


class KernelsChosen(TorchFunctionMode):
    """While active, notes the kernel of each call of scaled_dot_product_attention: `kernels`, by the query's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, str] = {}

    def __torch_function__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            chosen = SDPBackend(torch._fused_sdp_choice(*arguments, **options)).name
            self.kernels[" x ".join(map(str, arguments[0].shape))] = chosen
        return function(*arguments, **options)
