"""Optimizers in RAM and in GPU memory: AdamW with 8-bit moments, and SGD without any."""

from grpo_ds.optim.adamw8bit import CPUAdamW8bit
from grpo_ds.optim.build import build_optimizer
from grpo_ds.optim.sgd import CPUSGD

__all__ = ["CPUSGD", "CPUAdamW8bit", "build_optimizer"]
