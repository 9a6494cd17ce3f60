"""bitsandbytes' CPU kernels, run on one slice of the tensor at a time: needs no compiler, and is the tests' oracle."""

from collections.abc import Callable

import torch
from torch import Tensor

SLICE = 1 << 20  # elements: 20 MB of bitsandbytes' temporaries; smaller slices have too much overhead per call
BLOCK = 256  # values that share one scale; fixed by bitsandbytes' kernels
GRADIENT_LIMIT = 2.0**64  # the smallest gradient whose square overflows fp32, and with it the second moment


def first_bad_element(gradient: Tensor) -> int | None:
    """Index of the first element that is NaN, infinite or has an infinite square; None if there is none."""
    flat = gradient.view(-1)
    for start in range(0, flat.numel(), SLICE):
        window = flat[start : start + SLICE]
        if not bool(window.abs().max() < GRADIENT_LIMIT):  # a NaN makes the maximum NaN
            return start + int((~(window.abs() < GRADIENT_LIMIT)).nonzero()[0])
    return None


def slice_step(parameter: Tensor, gradient: Tensor, state: dict, group: dict, *, noise_key: int | None = None) -> None:
    """Update [N] elements in place with the blockwise 8-bit update, in slices that do not split a block."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    flat = {"parameter": parameter, "gradient": gradient, **{k: state[k] for k in ("state1", "state2")}}
    flat |= {"residual": state["residual"]} if "residual" in state else {}
    flat = {name: tensor.view(-1) for name, tensor in flat.items()}
    for start in range(0, parameter.numel(), SLICE):
        window = {name: tensor[start : start + SLICE] for name, tensor in flat.items()}
        blocks = slice(start // BLOCK, (start + SLICE) // BLOCK)

        def update(master: Tensor, window=window, blocks=blocks) -> None:
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam", window["gradient"], master, window["state1"], window["state2"],
                *group["betas"], 0.0, 0.0, group["eps"], state["step"], group["lr"],
                state["qmap1"], state["qmap2"], state["absmax1"][blocks], state["absmax2"][blocks],
                group["weight_decay"], 1.0,
            )  # fmt: skip

        _update_master(update, window["parameter"], window.get("residual"), noise_key, first=start)


def small_step(parameter: Tensor, gradient: Tensor, state: dict, group: dict, *, noise_key: int | None = None) -> None:
    """Update a small tensor in place with fp32 moments: below MIN_8BIT_SIZE bitsandbytes does not quantise them."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    def update(master: Tensor) -> None:
        torch.ops.bitsandbytes.optimizer_update_32bit(
            "adam", gradient, master, state["state1"], state["state2"], None, 0.0, 0.0,
            *group["betas"], 0.0, 0.0, group["eps"], group["weight_decay"], state["step"], group["lr"], 1.0,
        )  # fmt: skip

    _update_master(update, parameter, state.get("residual"), noise_key)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into a nearest bf16 (ties away from zero) and the int16 difference of the bit patterns; lossless."""
    bits = master.view(torch.int32)
    half = (bits + 0x8000) >> 16  # a tie to even could leave +32768, which int16 does not hold
    return half.to(torch.int16).view(torch.bfloat16), (bits - (half << 16)).to(torch.int16)


def join(half: Tensor, residual: Tensor) -> Tensor:
    """Return the fp32 values that were passed to `split`."""
    return ((half.view(torch.int16).to(torch.int32) << 16) + residual).view(torch.float32)


def round_stochastically(master: Tensor, noise_key: int, *, first: int = 0) -> Tensor:
    """Round fp32 to one of its two bf16 neighbours, more often to the nearer one: the mean over keys is the value.

    The noise of an element is a hash (Wellons, "lowbias32") of the key and its index, counted from `first`.
    """
    low = 0xFFFFFFFF
    x = (torch.arange(first, first + master.numel()).view(master.shape) & low) ^ noise_key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    bits = (master.view(torch.int32).long() & low) + ((x ^ (x >> 16)) >> 16)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _update_master(
    update: Callable[[Tensor], None],
    parameter: Tensor,
    residual: Tensor | None,
    noise_key: int | None,
    *,
    first: int = 0,
) -> None:
    """Apply `update` in fp32 to a parameter that is stored in one of the three ways."""
    if noise_key is not None:
        master = parameter.float()
        update(master)
        parameter.copy_(round_stochastically(master, noise_key, first=first))
    elif residual is not None:
        master = join(parameter, residual)
        update(master)
        half, rest = split(master)
        parameter.copy_(half)
        residual.copy_(rest)
    else:
        update(parameter)
