"""Base of the optimizers in RAM: checks before anything changes, and masters in bf16 with what they cannot hold."""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grpo_ds.errors import NumbersError, UsageError
from grpo_ds.optim import native, slices

Rounding = Literal["nearest", "residual", "residual8", "stochastic"]
# On loading, torch would cast these to the parameter's dtype.
EXACT_KEYS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "residual")
_BNB_WRAPPER = "__bnb_optimizer_quant_state__"  # bitsandbytes nests the exact keys under this one for FSDP


class NonFiniteGradient(NumbersError):
    """Error of a step that was refused before anything changed. `element`: index into the flat tensor."""

    def __init__(self, name: str, element: int, value: float):
        super().__init__(
            f"The optimizer refused a step: the gradient of {name} is {value} at element {element}.\n"
            "Parameters and moments are unchanged. Try a lower learning rate or gradient clipping."
        )
        self.element = element


class CPUOptimizer(torch.optim.Optimizer):
    """Base of optimizers whose parameters, in fp32 or bf16, and state are in RAM.

    Gradients may be fp32 or bf16, for any parameter. If a gradient is not finite, or so large that its square
    is not, the step raises NonFiniteGradient before anything changes.

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

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, rounding: Rounding, seed: int):
        check_choice("rounding", rounding, Rounding)
        self.rounding, self.seed = rounding, seed
        super().__init__(params, defaults)

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict, noise_key: int | None) -> None:
        """Update one tensor, which is not empty, and its state."""
        raise NotImplementedError

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
            _check_tensor(type(self).__name__, name, parameter)
            _check_tensor(type(self).__name__, f"the gradient of {name}", gradient)
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
        self._update(parameter, gradient, state, group, _noise_key(state))

    def _new_state(self, parameter: Tensor) -> dict[str, Any]:
        """Create the state of the rounding."""
        state: dict[str, Any] = {"step": 0}
        residual = {"residual": torch.int16, "residual8": torch.int8}.get(self.rounding)
        if parameter.dtype == torch.bfloat16 and residual is not None:
            state["residual"] = torch.zeros_like(parameter, dtype=residual)
        if parameter.dtype == torch.bfloat16 and self.rounding in ("residual8", "stochastic"):
            state["noise"] = (self.seed << 16) + len(self.state)  # unique for this tensor, and saved with it
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


def check_choice(name: str, value: str, allowed: Any) -> None:
    """Raise UsageError for a value that is not one of the Literal's."""
    if value not in get_args(allowed):
        raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(get_args(allowed))}.")


def check_amounts(optimizer: str, **amounts: float) -> None:
    """Raise UsageError for a number below 0."""
    for name, value in amounts.items():
        if not value >= 0:
            raise UsageError(f"{name} is {value}, but {optimizer} needs 0 or more.")


def _noise_key(state: dict[str, Any]) -> int | None:
    """Return 32 bits that differ for every step and tensor; None without stochastic rounding."""
    if "noise" not in state:
        return None
    return int.from_bytes(hashlib.blake2b(f"{state['noise']}/{state['step']}".encode(), digest_size=4).digest(), "big")


def _refuse_bad_gradient(name: str, gradient: Tensor) -> None:
    find = slices.first_bad_element if native.library() is None else native.native_first_bad_element
    element = find(gradient)
    if element is not None:
        raise NonFiniteGradient(name, element, gradient.view(-1)[element].item())


def _check_tensor(optimizer: str, what: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"{optimizer} updates fp32 and bf16 tensors in RAM, but {what} is {tensor.dtype} on {tensor.device}.\n"
            "Under ZeRO-2 set offload_optimizer.device to cpu; for tensors in GPU memory use "
            "bitsandbytes.optim.AdamW8bit."
        )
    if not tensor.is_contiguous():
        raise UsageError(f"{optimizer} updates contiguous tensors, but {what} is not. Call .contiguous() on it.")


def _names(group: dict, group_index: int) -> list[str]:
    """Names of the group's parameters as given to torch (named_parameters), else their positions."""
    fallback = [f"parameter {i} of group {group_index}" for i in range(len(group["params"]))]
    return group.get("param_names", fallback)
