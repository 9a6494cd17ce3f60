"""Measure the memory of a run, phase by phase, to compare it with its plan.

Always on: a phase costs two reads of /proc and, on a card, a synchronisation that it needs anyway. Phases may nest;
the time and peak of an inner phase do not count for the outer one.
"""

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_ds.errors import GrpoError
from grpo_ds.memory.plan import GIB, MEMORY_NAMES, MemoryKind, Plan
from grpo_ds.system.invocation import command

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see man proc_pid_clear_refs
# Phases within a step that keep what they freed for the next one. The update does not: it is the largest, and the
# phases behind it would measure what it left.
KEEPING_FREED = {"sample", "reference", "step"}


@dataclass(frozen=True, slots=True)
class Span:
    """An uninterrupted stretch of a phase; times in seconds, memory in bytes.

    Example: an update that began after 4.5 seconds and took 3.1, on a CPU.
        >>> sizes = {"ram_peak": 5 * GIB, "ram_end": 4 * GIB, "pinned": 0, "gpu_peak": 0, "gpu_reserved": 0}
        >>> Span("update", start=4.5, seconds=3.1, **sizes).ram_peak // GIB
        5
    """

    phase: str
    start: float  # since the profiler began
    seconds: float
    ram_peak: int  # resident memory of the process
    ram_end: int
    pinned: int  # page-locked, as torch counts it; part of ram_end
    gpu_peak: int  # allocated by torch: what the plan predicts
    gpu_reserved: int  # held by torch, its cache included


@dataclass(frozen=True, slots=True)
class PhaseUse:
    """Spans of a phase together: the largest of each peak, the sum of the times.

    Example: two updates of 3.1 and 2.9 seconds; the larger one took 5 GiB.
        >>> use = PhaseUse("update", 3.1 + 2.9, ram_peak=5 * GIB, pinned=0, gpu_peak=0, gpu_reserved=0)
        >>> use.peak("ram") // GIB
        5
    """

    phase: str
    seconds: float
    ram_peak: int
    pinned: int
    gpu_peak: int
    gpu_reserved: int

    def peak(self, kind: MemoryKind) -> int:
        return self.gpu_peak if kind == "gpu" else self.ram_peak


class OutOfMemory(GrpoError):
    """GPU memory or RAM was full in `phase`."""

    exit_code = 5

    def __init__(self, message: str, phase: str) -> None:
        super().__init__(message)
        self.phase = phase


class Profiler:
    """Measures phases. If a phase runs out of memory, the error message quotes `plan`."""

    def __init__(self, device: torch.device, plan: Plan | None = None, *, exact: bool = False) -> None:
        """exact: phases within a step also begin without memory that earlier phases freed."""
        self.plan, self.spans, self.exact = plan, list[Span](), exact
        self._gpu = device if device.type == "cuda" else None
        self._began = time.monotonic()
        self._open: list[str] = []
        self._mark = self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count everything inside as phase `name`. Raises OutOfMemory instead of torch's error."""
        self._cut()
        self._open.append(name)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if (kind := _full_memory(error)) is None:
                raise
            self._cut()
            raise OutOfMemory(self._explain(name, kind, error), name) from error
        finally:
            self._cut()
            self._open.pop()

    @property
    def doing(self) -> str:
        """Name of the open phase; "" between two phases."""
        return next(iter(self._open[-1:]), "")

    def uses(self, first: int = 0) -> dict[str, PhaseUse]:
        """Return the use of each phase since span number `first`, in the order in which they began."""
        spans: dict[str, list[Span]] = {}
        for span in sorted(self.spans[first:], key=lambda span: span.start):
            spans.setdefault(span.phase, []).append(span)
        peaks = ("ram_peak", "pinned", "gpu_peak", "gpu_reserved")
        return {
            name: PhaseUse(name, sum(s.seconds for s in some), *(max(getattr(s, peak) for s in some) for peak in peaks))
            for name, some in spans.items()
        }

    def peak(self, kind: MemoryKind) -> int:
        """Return the largest peak so far."""
        return max((s.gpu_peak if kind == "gpu" else s.ram_peak for s in self.spans), default=0)

    def _cut(self) -> None:
        """End the span of the open phase and restart the peaks."""
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
        now = time.monotonic()
        if self._open:
            self.spans.append(Span(self._open[-1], self._mark - self._began, now - self._mark, *self._read()))
        if self._gpu:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        if self.exact or (self._open and self._open[-1] not in KEEPING_FREED):
            _return_freed_memory()
        reset_resident_peak()
        self._mark = now

    def _read(self) -> tuple[int, int, int, int, int]:
        peak, end = resident_memory()
        if not self._gpu:
            return peak, end, 0, 0, 0
        pinned = int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
        return peak, end, pinned, torch.cuda.max_memory_allocated(self._gpu), torch.cuda.max_memory_reserved(self._gpu)

    def _explain(self, name: str, kind: MemoryKind, error: BaseException) -> str:
        planned = {phase.name: phase.bytes_in(kind) for phase in self.plan.phases} if self.plan else {}
        plan = f"{planned[name] / GIB:.1f} GiB were planned for it" if name in planned else "this phase was not planned"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # Python's own MemoryError has no text
        first, second = RELIEF.get((name, kind), RELIEF[("update", kind)])
        return (
            f"Out of {MEMORY_NAMES[kind]} in phase '{name}': {self.uses()[name].peak(kind) / GIB:.1f} GiB were in use, "
            f"{plan}.\n{reason[:200]}\n"
            f"What helps most here: {first}, then {second}.\n"
            f"`{command('select')}` shows what fits this machine."
        )


PARTS = "--pack_tokens 2048 (fewer completions at once; at least a prompt with its completion)"
# The two changes that reduce a phase most, by the memory that was full.
RELIEF: dict[tuple[str, MemoryKind], tuple[str, str]] = {
    ("sample", "gpu"): ("a smaller --generation_batch_size", "a smaller --max_completion_length"),
    ("evaluate", "gpu"): ("a smaller --generation_batch_size", "a smaller --max_completion_length"),
    ("reference", "gpu"): (PARTS, "--beta 0 for no reference, or (without LoRA) --reference bf16-cpu"),
    ("update", "gpu"): ("--gradient_checkpointing true", PARTS),
    ("initialise", "gpu"): ("a smaller --model", "--ds ds_configs/zero2.json, which keeps the optimizer in RAM"),
    ("load", "ram"): ("a smaller --model", "closing other programs"),
    ("initialise", "ram"): ("--ds ds_configs/zero2_lowram7.json (7 bytes per parameter)", "a smaller --model"),
    ("step", "ram"): ("--ds ds_configs/zero2_lowram7.json (7 bytes per parameter)", "a smaller --model"),
    ("update", "ram"): ("--ds ds_configs/zero2_lowram7.json (7 bytes per parameter)", "--gradient_checkpointing true"),
}


def resident_memory() -> tuple[int, int]:
    """Return resident bytes: the peak since the last reset, and now. Without /proc: the peak of the run."""
    if not STATUS.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak
    fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return peak, now


def reset_resident_peak() -> None:
    """Restart the peak of resident_memory() at the current value."""
    with suppress(OSError):  # no Linux, or a restricted container: a phase then includes the peaks of earlier phases
        CLEAR.write_text(RESET_PEAK, encoding="ascii")


def _return_freed_memory() -> None:
    """Make the C library return freed memory to the system, so that the next phase does not include it.

    It keeps small freed blocks: on a CPU up to half a gigabyte of activations. Allocating them again takes time on a
    CPU: 2 % of a step behind each update, a fifth of an update behind each phase.
    """
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _full_memory(error: BaseException) -> MemoryKind | None:
    """Return the memory that an error reports as full; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "gpu"
    full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return "ram" if full else None
