"""AdamW with 8-bit moments for parameters that live in host memory: bitsandbytes' update without its temporaries.

bitsandbytes dequantises the whole tensor first, which for ZeRO's flat partition is 20 bytes a parameter
(62 GB for 3B); here the same update runs over a block at a time, so a step needs no room to speak of.
State layout (keys, dtypes, shapes) is bitsandbytes', so a state dict moves between the two.

N elements of a tensor, K = ceil(N / 256) blocks of it that share one scale.
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
# torch would cast these to the parameter's dtype on loading.
EXACT_KEYS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "residual")
Rounding = Literal["nearest", "residual", "stochastic"]
_BNB_WRAPPER = "__bnb_optimizer_quant_state__"  # bitsandbytes nests the exact keys under this one for FSDP


class NonFiniteGradient(NumbersError):
    """A step that was refused: nothing has changed. `element` indexes the flat tensor."""

    def __init__(self, name: str, element: int, value: float):
        super().__init__(
            f"The optimizer refused a step: the gradient of {name} is {value} at element {element}.\n"
            "Parameters and moments are unchanged. Try a lower learning rate or gradient clipping."
        )
        self.element = element


class CPUAdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' blockwise 8-bit AdamW (Dettmers et al. 2022, arXiv:2110.02861) for CPU tensors in fp32 or bf16.

    Gradients may be fp32 or bf16, whatever the parameter is. A step whose gradients are not all finite, or so large
    that their square is not, raises NonFiniteGradient before anything changes.

    rounding: what becomes of the new value of a bf16 parameter; fp32 parameters are never rounded.
        nearest: is lost where the step is smaller than half of bf16's spacing, which at fine-tuning rates it mostly is.
        residual: the parameter is the upper half of an fp32 master whose other 16 bits live in state["residual"]. The
            steps are those of the fp32 master, bit by bit, at two bytes a parameter less than it and a bf16 copy.
        stochastic: no memory at all, and right on average (Gupta et al. 2015, arXiv:1502.02551). The noise is a
            function of `seed`, the tensor, its element and the step, and a state dict carries it on.
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
        seed: int = 0,
    ):
        _check_hyperparameters(lr, betas, eps, weight_decay)
        if rounding not in get_args(Rounding):
            raise UsageError(f"rounding is {rounding!r}; CPUAdamW8bit knows {', '.join(get_args(Rounding))}.")
        self.rounding, self.seed = rounding, seed
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient; returns the closure's loss."""
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
            take = slices.small_step
        else:
            take = slices.slice_step if native.library() is None else native.native_step
        take(parameter, gradient, state, group, noise_key=_noise_key(state))

    def _new_state(self, parameter: Tensor) -> dict[str, Any]:
        """Zero moments (bitsandbytes starts at code 0 with scale 0, which decodes to zero) and what rounding needs."""
        small = parameter.numel() < MIN_8BIT_SIZE
        dtype = torch.float32 if small else torch.uint8
        state = {"step": 0, **{key: torch.zeros_like(parameter, dtype=dtype) for key in ("state1", "state2")}}
        if parameter.dtype == torch.bfloat16 and self.rounding == "residual":
            state["residual"] = torch.zeros_like(parameter, dtype=torch.int16)
        if parameter.dtype == torch.bfloat16 and self.rounding == "stochastic":
            state["noise"] = (self.seed << 16) + len(self.state)  # this tensor's own, and its for good
        if not small:
            blocks = -(-parameter.numel() // BLOCK)
            state |= {"absmax1": torch.zeros(blocks), "absmax2": torch.zeros(blocks)}
            state["qmap1"], state["qmap2"] = _dynamic_maps()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes this class's state dicts and bitsandbytes', wrapped for FSDP or not."""
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
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The 8-bit AdamW for where the moments live: ours in host memory, bitsandbytes' on the card."""
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if offload or not torch.cuda.is_available():
        return CPUAdamW8bit(parameters, **settings, rounding=rounding, seed=seed)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _noise_key(state: dict[str, Any]) -> int | None:
    """32 bits that no other step and no other tensor has; None where nothing is rounded stochastically."""
    if "noise" not in state:
        return None
    return int.from_bytes(hashlib.blake2b(f"{state['noise']}/{state['step']}".encode(), digest_size=4).digest(), "big")


@functools.cache
def _dynamic_maps() -> tuple[Tensor, Tensor]:
    """What the 256 codes mean, for the first (signed) and the second (unsigned) moment."""
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
            f"CPUAdamW8bit steps fp32 and bf16 tensors in host memory, but {what} is {tensor.dtype} on "
            f"{tensor.device}.\nUnder ZeRO-2 set offload_optimizer.device to cpu; on the card use "
            "bitsandbytes.optim.AdamW8bit."
        )
    if not tensor.is_contiguous():
        raise UsageError(f"CPUAdamW8bit steps contiguous tensors, but {what} is not. Call .contiguous() on it.")


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
    """What torch's named_parameters form left in the group, else the position."""
    fallback = [f"parameter {i} of group {group_index}" for i in range(len(group["params"]))]
    return group.get("param_names", fallback)
