"""SGD without momentum for parameters in RAM: no moments, so masters and gradients are all that it needs."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from grpo_ds.optim import native, slices
from grpo_ds.optim.cpu_optimizer import CPUOptimizer, Rounding, check_amounts


class CPUSGD(CPUOptimizer):
    """p <- p - lr (g + weight_decay p), for CPU tensors in fp32 or bf16.

    Reported to match AdamW in reinforcement learning of language models (arXiv:2602.07729). Its learning rate is some
    thousand times that of Adam, whose steps do not depend on the size of a gradient.

    rounding, seed: see CPUOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ):
        check_amounts("CPUSGD", lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, rounding=rounding, seed=seed)

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict, noise_key: int | None) -> None:
        update = slices.sgd_slice_step if native.library() is None else native.native_sgd_step
        update(parameter, gradient, state, group, noise_key=noise_key)
