"""The optimizer that a DeepSpeed JSON asks for, if it is one of ours."""

from collections.abc import Iterable
from typing import Any

import torch

from grpo_ds.optim.adamw8bit import CPUAdamW8bit
from grpo_ds.optim.cpu_optimizer import Rounding
from grpo_ds.optim.sgd import CPUSGD


def build_optimizer(
    parameters: Iterable[Any],
    kind: str = "AdamW8bit",
    *,
    offload: bool,
    rounding: Rounding = "nearest",
    seed: int = 0,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Build "AdamW8bit" or "SGD": ours for parameters in RAM, bitsandbytes' or torch's for those in GPU memory.

    settings: of the optimizer, such as lr, betas, moments.
    """
    if offload or not torch.cuda.is_available():
        ours = CPUSGD if kind == "SGD" else CPUAdamW8bit
        return ours(parameters, **settings, rounding=rounding, seed=seed)
    if kind == "SGD":
        return torch.optim.SGD(parameters, **settings)
    import bitsandbytes

    settings.pop("moments", None)  # ds_checks.py: bitsandbytes' own
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)
