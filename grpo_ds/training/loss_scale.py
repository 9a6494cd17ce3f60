"""The loss scale of fp16: DeepSpeed's scaler, moved after a step instead of within it.

fp16 holds nothing above 65,504 and loses what is below 6e-8, so backward starts from the loss times a scale, and the
optimizer gets the gradients divided by it. A gradient that overflows halves the scale, and its step is skipped; after
`loss_scale_window` steps without one the scale doubles.

DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, step) moves the scale before it divides the gradients by it: at a step
after which the scale doubles it would halve them. So its own call is silenced, and ours comes after the step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LossScale:
    """The loss scale of an engine; always 1 in bf16 and fp32."""

    def __init__(self, zero: Any, *, fp16: bool) -> None:
        """zero: DeepSpeed's optimizer, of ZeRO stage 1 or 2 if fp16."""
        self.fp16, self._zero = fp16, zero
        if fp16:
            zero._update_scale = lambda overflow: None

    @property
    def value(self) -> float:
        """The number that the next loss is multiplied by."""
        return float(self._scaler.cur_scale) if self.fp16 else 1.0

    @property
    def can_fall(self) -> bool:
        """True if an overflow lowers the scale, or is one of those that `hysteresis` lets pass first."""
        if not self.fp16 or not self._scaler.dynamic:
            return False
        waits = self._scaler.delayed_shift > 1 and self._scaler.cur_hysteresis > 1
        return waits or self._scaler.cur_scale > self._scaler.min_scale

    @property
    def is_stuck(self) -> bool:
        """True in fp16 if an overflow leaves the scale where it is."""
        return self.fp16 and not self.can_fall

    def count_step(self, *, overflow: bool) -> None:
        """Count a step, or one that an overflow has skipped, and move the scale; the same on every rank."""
        if self.fp16:
            self._scaler.update_scale(overflow)

    @contextmanager
    def unchanged(self, value: float | None = None) -> Iterator[None]:
        """Give the scale and its counters back afterwards; in between it begins at `value`, if there is one."""
        before = dict(vars(self._scaler)) if self.fp16 else {}
        if self.fp16 and value is not None:
            self._scaler.cur_scale = value
        try:
            yield
        finally:
            if self.fp16:
                vars(self._scaler).update(before)

    @property
    def _scaler(self) -> Any:
        return self._zero.loss_scaler  # another object after a checkpoint is loaded
