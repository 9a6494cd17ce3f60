"""AdamW with 8-bit moments for parameters in RAM: bitsandbytes' update without its temporaries.

bitsandbytes first dequantises the complete tensor, which takes 20 bytes per parameter for ZeRO's flat partition (62 GB
for 3B parameters). Here the same update runs over one block at a time, so a step needs almost no extra memory. With
bitsandbytes' codes the state layout (keys, dtypes, shapes) is its own, so each can load the other's state dict.

N elements of a tensor, K = ceil(N / 256) blocks that share one scale.
"""

import functools
import hashlib
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grpo_ds.errors import NumbersError, UsageError
from grpo_ds.optim import native, slices
from grpo_ds.optim.slices import BLOCK

MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the moments of smaller tensors (norms, biases) in fp32
# On loading, torch would cast these to the parameter's dtype.
EXACT_KEYS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "residual")
Rounding = Literal["nearest", "residual", "residual8", "stochastic"]
Moments = Literal["bitsandbytes", "companded"]
_BNB_WRAPPER = "__bnb_optimizer_quant_state__"  # bitsandbytes nests the exact keys under this one for FSDP


class NonFiniteGradient(NumbersError):
    """Error of a step that was refused before anything changed. `element`: index into the flat tensor."""

    def __init__(self, name: str, element: int, value: float):
        super().__init__(
            f"The optimizer refused a step: the gradient of {name} is {value} at element {element}.\n"
            "Parameters and moments are unchanged. Try a lower learning rate or gradient clipping."
        )
        self.element = element


class CPUAdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' blockwise 8-bit AdamW (Dettmers et al. 2022, arXiv:2110.02861) for CPU tensors in fp32 or bf16.

    Gradients may be fp32 or bf16, for any parameter. If a gradient is not finite, or so large that its square
    is not, the step raises NonFiniteGradient before anything changes.

    moments: codes of the moments. A state keeps those that it was made with.
        bitsandbytes: its dynamic maps of 256 values (Dettmers et al. 2022).
        companded: computed (slices.encode_first, encode_root), which is faster and has finer steps near zero.
            absmax2 is the largest root of a second moment, and there are no maps.

    rounding: how the new value of a bf16 parameter is rounded; fp32 parameters are never rounded.
        nearest: to the nearest bf16. A step smaller than half of bf16's spacing is lost, and at fine-tuning learning
            rates most steps are.
        residual: the parameter is the upper half of an fp32 master; its other 16 bits are in state["residual"]. The
            steps are those of the fp32 master, bit by bit. It needs two bytes per parameter less than a master
            and a bf16 copy.
        residual8: the same with 8 of the 16 bits, one byte per parameter; the last 8 bits of the fp32 master are
            rounded up or down at random.
        stochastic: up or down at random, correct on average, without extra memory (Gupta et al. 2015,
            arXiv:1502.02551). The noise is a function of `seed`, the tensor, its element and the step; a state dict
            keeps it.
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
        _check_hyperparameters(lr, betas, eps, weight_decay)
        for name, value, allowed in (("rounding", rounding, Rounding), ("moments", moments, Moments)):
            if value not in get_args(allowed):
                raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(get_args(allowed))}.")
        self.rounding, self.moments, self.seed = rounding, moments, seed
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (name, group, parameter, parameter.grad)
            for group_index, group in enumerate(self.param_groups)
            for name, parameter in zip(_names(group, group_index), group["params"], strict=True)
            if parameter.grad is not None
        ]
        for name, _, parameter, gradient in work:
            _check_tensor(name, parameter)
            _check_tensor(f"the gradient of {name}", gradient)
        for name, _, _, gradient in work:
            _refuse_bad_gradient(name, gradient)
        for _, group, parameter, gradient in work:
            self._step_tensor(group, parameter, gradient)
        return loss

    def _step_tensor(self, group: dict, parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter))
        state["step"] += 1
        if parameter.numel() == 0:  # a rank's partition can be empty
            return
        if state["state1"].dtype != torch.uint8:
            update = slices.small_step
        else:
            update = slices.slice_step if native.library() is None else native.native_step
        update(parameter, gradient, state, group, noise_key=_noise_key(state))

    def _new_state(self, parameter: Tensor) -> dict[str, Any]:
        """Create zero moments (as in bitsandbytes, code 0 with scale 0 decodes to zero) and the rounding's state."""
        small = parameter.numel() < MIN_8BIT_SIZE
        dtype = torch.float32 if small else torch.uint8
        state = {"step": 0, **{key: torch.zeros_like(parameter, dtype=dtype) for key in ("state1", "state2")}}
        residual = {"residual": torch.int16, "residual8": torch.int8}.get(self.rounding)
        if parameter.dtype == torch.bfloat16 and residual is not None:
            state["residual"] = torch.zeros_like(parameter, dtype=residual)
        if parameter.dtype == torch.bfloat16 and self.rounding in ("residual8", "stochastic"):
            state["noise"] = (self.seed << 16) + len(self.state)  # unique for this tensor, and saved with it
        if not small:
            blocks = -(-parameter.numel() // BLOCK)
            state |= {"absmax1": torch.zeros(blocks), "absmax2": torch.zeros(blocks)}
            if self.moments == "bitsandbytes":
                state["qmap1"], state["qmap2"] = _dynamic_maps()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of this class or of bitsandbytes (wrapped for FSDP or not)."""
        saved_states = {
            key: {**{k: v for k, v in entry.items() if k != _BNB_WRAPPER}, **entry.get(_BNB_WRAPPER, {})}
            for key, entry in state_dict["state"].items()
        }
        plain = {key: {k: v for k, v in s.items() if k not in EXACT_KEYS} for key, s in saved_states.items()}
        super().load_state_dict({**state_dict, "state": plain})
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            saved = saved_states.get(saved_id, {})
            self.state[parameter].update({k: saved[k].detach().cpu().clone() for k in EXACT_KEYS if k in saved})


def build_optimizer(
    parameters: Iterable[Any],
    *,
    offload: bool,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: Rounding = "nearest",
    moments: Moments = "bitsandbytes",
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Build the 8-bit AdamW: ours for moments in RAM, bitsandbytes' for moments in GPU memory."""
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if offload or not torch.cuda.is_available():
        return CPUAdamW8bit(parameters, **settings, rounding=rounding, moments=moments, seed=seed)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _noise_key(state: dict[str, Any]) -> int | None:
    """Return 32 bits that differ for every step and tensor; None without stochastic rounding."""
    if "noise" not in state:
        return None
    return int.from_bytes(hashlib.blake2b(f"{state['noise']}/{state['step']}".encode(), digest_size=4).digest(), "big")


@functools.cache
def _dynamic_maps() -> tuple[Tensor, Tensor]:
    """Values of the 256 codes, for the first (signed) and the second (unsigned) moment."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True), create_dynamic_map(signed=False)


def _refuse_bad_gradient(name: str, gradient: Tensor) -> None:
    find = slices.first_bad_element if native.library() is None else native.native_first_bad_element
    element = find(gradient)
    if element is not None:
        raise NonFiniteGradient(name, element, gradient.view(-1)[element].item())


def _check_tensor(what: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"CPUAdamW8bit updates fp32 and bf16 tensors in RAM, but {what} is {tensor.dtype} on {tensor.device}.\n"
            "Under ZeRO-2 set offload_optimizer.device to cpu; for tensors in GPU memory use "
            "bitsandbytes.optim.AdamW8bit."
        )
    if not tensor.is_contiguous():
        raise UsageError(f"CPUAdamW8bit updates contiguous tensors, but {what} is not. Call .contiguous() on it.")


def _check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for name, value, right in (
        ("lr", lr, lr >= 0),
        ("eps", eps, eps >= 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
        ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
    ):
        if not right:
            wanted = "two numbers in [0, 1)" if name == "betas" else "0 or more"
            raise UsageError(f"{name} is {value}, but CPUAdamW8bit needs {wanted}.")


def _names(group: dict, group_index: int) -> list[str]:
    """Names of the group's parameters as given to torch (named_parameters), else their positions."""
    fallback = [f"parameter {i} of group {group_index}" for i in range(len(group["params"]))]
    return group.get("param_names", fallback)
