"""bitsandbytes' kernels and torch on one slice of the tensor at a time: needs no compiler, and is the tests' oracle."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 1 << 20  # elements: 20 MB of bitsandbytes' temporaries; smaller slices have too much overhead per call
BLOCK = 256  # values that share one scale; fixed by bitsandbytes' kernels
LOW = 0xFFFFFFFF
# Computed codes of a first moment's size and of a second moment's root: (bits of a mantissa left out, bits of code 0,
# largest code). Code 0 stands for a power of 2 and has none of the bits of a code.
FIRST, ROOT = (19, 0x780, 127), (18, 0xF00, 255)
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
    flat = {"parameter": parameter, "gradient": gradient, **{k: state[k] for k in ("state1", "state2")}}
    flat |= {"residual": state["residual"]} if "residual" in state else {}
    flat = {name: tensor.view(-1) for name, tensor in flat.items()}
    for start in range(0, parameter.numel(), SLICE):
        window = {name: tensor[start : start + SLICE] for name, tensor in flat.items()}
        blocks = slice(start // BLOCK, (start + SLICE) // BLOCK)

        scales = state["absmax1"][blocks], state["absmax2"][blocks]

        def update(master: Tensor, window=window, scales=scales) -> None:
            kind = _dynamic_update if "qmap1" in state else _companded_update
            kind(master, window, scales, state, group)

        _update_master(update, window["parameter"], window.get("residual"), noise_key, first=start)


def sgd_slice_step(
    parameter: Tensor, gradient: Tensor, state: dict, group: dict, *, noise_key: int | None = None
) -> None:
    """Update [N] elements in place by SGD."""
    flat = {"parameter": parameter, "gradient": gradient}
    flat |= {"residual": state["residual"]} if "residual" in state else {}
    flat = {name: tensor.view(-1) for name, tensor in flat.items()}
    for start in range(0, parameter.numel(), SLICE):
        window = {name: tensor[start : start + SLICE] for name, tensor in flat.items()}

        def update(master: Tensor, change: Tensor = window["gradient"]) -> None:
            master.mul_(1 - group["lr"] * group["weight_decay"]).add_(change.float(), alpha=-group["lr"])

        _update_master(update, window["parameter"], window.get("residual"), noise_key, first=start)


def _dynamic_update(
    master: Tensor, window: dict[str, Tensor], scales: tuple[Tensor, Tensor], state: dict, group: dict
) -> None:
    """bitsandbytes' update."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", window["gradient"], master, window["state1"], window["state2"],
        *group["betas"], 0.0, 0.0, group["eps"], state["step"], group["lr"],
        state["qmap1"], state["qmap2"], *scales, group["weight_decay"], 1.0,
    )  # fmt: skip


def _companded_update(
    master: Tensor, window: dict[str, Tensor], scales: tuple[Tensor, Tensor], state: dict, group: dict
) -> None:
    """The same update with computed codes of the moments (`encode_first`, `encode_root`)."""
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
    gradient, count = window["gradient"].float(), master.numel()
    first = decode_first(window["state1"], scales[0]).mul_(beta1).add_(gradient, alpha=1 - beta1)
    second = decode_root(window["state2"], scales[1] * math.sqrt(beta2)).square_()
    root = second.addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    change = first / (root + group["eps"] * correction2)
    master.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"] * correction2 / correction1)
    for code, scale, encode, moment in zip(
        (window["state1"], window["state2"]), scales, (encode_first, encode_root), (first, root), strict=True
    ):
        codes, largest = encode(moment)
        code.copy_(codes[:count])
        scale.copy_(largest)


def encode_first(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return (uint8 codes, fp32 scales) of first moments [N]: a sign and 127 companded sizes.

    The code is a signed byte. A size u, as a share of its block's largest, is shifted to y = offset + u (top - offset);
    its code is the exponent and the first bits of the mantissa of y, counted from those of the offset (mu-law in
    straight pieces). Steps are a sixteenth of an octave of y, and fine near zero.
    """
    blocks, largest, inverse = _scaled(moment, FIRST)
    codes = _compress(blocks.abs() * inverse, FIRST)
    codes = torch.where(blocks < 0, -codes, codes).to(torch.int8).view(torch.uint8)
    return codes.flatten()[: moment.numel()], largest


def encode_root(root: Tensor) -> tuple[Tensor, Tensor]:
    """Return (uint8 codes, fp32 scales) of roots of second moments [N]: 255 companded sizes.

    Steps are a 32nd of an octave. Only 0 has code 0: a small root rounded to 0 would divide the first moment by eps
    alone.
    """
    blocks, largest, inverse = _scaled(root, ROOT)
    sizes = blocks * inverse
    codes = _compress(sizes, ROOT)
    codes[(codes == 0) & (sizes > 0)] = 1
    return codes.to(torch.uint8).flatten()[: root.numel()], largest


def decode_first(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the fp32 moments that `encode_first` has kept."""
    signed = codes.view(torch.int8).int()
    return _expand(signed.abs(), scales, FIRST).mul_(signed.sign())


def decode_root(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the fp32 roots that `encode_root` has kept."""
    return _expand(codes.int(), scales, ROOT)


def _ends(law: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return the offset, and the top less it."""
    lost, first, last = law
    offset, top = (torch.tensor(bits << lost, dtype=torch.int32).view(torch.float32) for bits in (first, first | last))
    return offset, top - offset


def _compress(sizes: Tensor, law: tuple[int, int, int]) -> Tensor:
    lost, first, _ = law
    bits = (sizes + _ends(law)[0]).view(torch.int32)
    return ((bits + (1 << (lost - 1))) >> lost) - first


def _expand(codes: Tensor, scales: Tensor, law: tuple[int, int, int]) -> Tensor:
    (lost, first, _), (offset, span) = law, _ends(law)
    sizes = ((codes | first) << lost).view(torch.float32) - offset
    return sizes.mul_((scales / span).repeat_interleave(BLOCK)[: codes.numel()])


def _scaled(values: Tensor, law: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return [K, 256] values padded with 0, the largest size of each block [K], and (top - offset) / it [K, 1].

    A block too small to have an inverse becomes zero.
    """
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    largest = largest.where(largest > 2.0**-127, 0.0)
    return blocks, largest, torch.where(largest > 0, _ends(law)[1] / largest, 0.0)[:, None]


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
    """Return the fp32 values that were passed to `split`; with an int8 residual those that `split8` has kept."""
    rest = residual.to(torch.int32) << (16 - 8 * residual.element_size())
    return ((half.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def split8(master: Tensor, noise_key: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Split fp32 into a nearest bf16 (ties away from zero) and the int8 difference in 256ths of its last place.

    The last 8 bits of the fp32 are rounded up or down at random, as in `round_stochastically`.
    """
    kept = ((master.view(torch.int32).long() & LOW) + (_noise(master, noise_key, first) >> 24)) >> 8
    half = (kept + 0x80) >> 8
    return half.to(torch.int16).view(torch.bfloat16), (kept - (half << 8)).to(torch.int8)


def round_stochastically(master: Tensor, noise_key: int, *, first: int = 0) -> Tensor:
    """Round fp32 to one of its two bf16 neighbours, more often to the nearer one: the mean over keys is the value.

    The noise of an element is a hash (Wellons, "lowbias32") of the key and its index, counted from `first`.
    """
    bits = (master.view(torch.int32).long() & LOW) + (_noise(master, noise_key, first) >> 16)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _noise(master: Tensor, noise_key: int, first: int) -> Tensor:
    """Return 32 bits for each element, as int64."""
    x = (torch.arange(first, first + master.numel()).view(master.shape) & LOW) ^ noise_key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW
    return x ^ (x >> 16)


def _update_master(
    update: Callable[[Tensor], None],
    parameter: Tensor,
    residual: Tensor | None,
    noise_key: int | None,
    *,
    first: int = 0,
) -> None:
    """Apply `update` in fp32 to a parameter that is stored in one of the four ways."""
    if residual is not None:
        master = join(parameter, residual)
        update(master)
        half, rest = split(master) if noise_key is None else split8(master, noise_key, first=first)
        parameter.copy_(half)
        residual.copy_(rest)
    elif noise_key is not None:
        master = parameter.float()
        update(master)
        parameter.copy_(round_stochastically(master, noise_key, first=first))
    else:
        update(parameter)
