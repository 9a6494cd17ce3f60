"""Optimizers with 8-bit moments, in RAM and in GPU memory."""

from grpo_ds.optim.adamw8bit import CPUAdamW8bit, build_optimizer

__all__ = ["CPUAdamW8bit", "build_optimizer"]
