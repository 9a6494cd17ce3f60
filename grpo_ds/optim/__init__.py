"""Optimizers that are as small as the memory they run in."""

from grpo_ds.optim.adamw8bit import CPUAdamW8bit, build_optimizer

__all__ = ["CPUAdamW8bit", "build_optimizer"]
