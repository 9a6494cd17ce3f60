"""AdamW with 8-bit moments for parameters in RAM: bitsandbytes' update without its temporaries.

bitsandbytes first dequantises the complete tensor, which takes 20 bytes per parameter for ZeRO's flat partition (62 GB
for 3B parameters). Here the same update runs over one block at a time, so a step needs almost no extra memory. With
bitsandbytes' codes the state layout (keys, dtypes, shapes) is its own, so each can load the other's state dict.

N elements of a tensor, K = ceil(N / 256) blocks that share one scale.
"""

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from grpo_ds.errors import UsageError
from grpo_ds.optim import native, slices
from grpo_ds.optim.cpu_optimizer import CPUOptimizer, Rounding, check_amounts, check_choice
from grpo_ds.optim.slices import BLOCK

MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the moments of smaller tensors (norms, biases) in fp32
Moments = Literal["bitsandbytes", "companded"]


class CPUAdamW8bit(CPUOptimizer):
    """bitsandbytes' blockwise 8-bit AdamW (Dettmers et al. 2022, arXiv:2110.02861) for CPU tensors in fp32 or bf16.

    moments: codes of the moments. A state keeps those that it was made with.
        bitsandbytes: its dynamic maps of 256 values (Dettmers et al. 2022).
        companded: computed (slices.encode_first, encode_root), which is faster and has finer steps near zero.
            absmax2 is the largest root of a second moment, and there are no maps.

    rounding, seed: see CPUOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rounding: Rounding = "nearest",
        moments: Moments = "bitsandbytes",
        seed: int = 0,
    ):
        check_amounts("CPUAdamW8bit", lr=lr, eps=eps, weight_decay=weight_decay)
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise UsageError(f"betas is {betas}, but CPUAdamW8bit needs two numbers in [0, 1).")
        check_choice("moments", moments, Moments)
        self.moments = moments
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, seed=seed)

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict, noise_key: int | None) -> None:
        if state["state1"].dtype != torch.uint8:
            update = slices.small_step
        else:
            update = slices.slice_step if native.library() is None else native.native_step
        update(parameter, gradient, state, group, noise_key=noise_key)

    def _new_state(self, parameter: Tensor) -> dict[str, Any]:
        """Create zero moments (as in bitsandbytes, code 0 with scale 0 decodes to zero) and the rounding's state."""
        small = parameter.numel() < MIN_8BIT_SIZE
        dtype = torch.float32 if small else torch.uint8
        moments = {key: torch.zeros_like(parameter, dtype=dtype) for key in ("state1", "state2")}
        state = {**super()._new_state(parameter), **moments}
        if not small:
            blocks = -(-parameter.numel() // BLOCK)
            state |= {"absmax1": torch.zeros(blocks), "absmax2": torch.zeros(blocks)}
            if self.moments == "bitsandbytes":
                state["qmap1"], state["qmap2"] = _dynamic_maps()
        return state


@functools.cache
def _dynamic_maps() -> tuple[Tensor, Tensor]:
    """Values of the 256 codes, for the first (signed) and the second (unsigned) moment."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True), create_dynamic_map(signed=False)
