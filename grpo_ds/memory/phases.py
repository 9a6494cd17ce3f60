"""Measured memory of a run, phase by phase: what the plan beside it has to answer for.

Always on: a phase costs two reads of /proc and, on a card, a synchronisation it needed anyway. Phases may nest; while
an inner one runs, the outer one's clock and peak stand still.
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
from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.system.invocation import command

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of man proc_pid_clear_refs
STEP_PHASES = {"sample", "reference", "update", "step"}


@dataclass(frozen=True, slots=True)
class Span:
    """An uninterrupted stretch of a phase; times in seconds, memory in bytes."""

    phase: str
    start: float  # since the profiler began
    seconds: float
    host_peak: int  # resident
    host_end: int
    pinned: int  # page-locked, as torch counts it; of host_end
    gpu_peak: int  # allocated by torch: what the plan predicts
    gpu_reserved: int  # what torch holds of the card, its cache included


@dataclass(frozen=True, slots=True)
class PhaseUse:
    """All spans of a phase: the largest of each peak, the sum of the times."""

    phase: str
    seconds: float
    host_peak: int
    pinned: int
    gpu_peak: int
    gpu_reserved: int

    def peak(self, where: Where) -> int:
        return self.gpu_peak if where == "gpu" else self.host_peak


class OutOfMemory(GrpoError):
    """The card or the host was full in `phase`."""

    exit_code = 5

    def __init__(self, message: str, phase: str) -> None:
        super().__init__(message)
        self.phase = phase


class Profiler:
    """Watches phases; `plan` is quoted where one of them runs out of memory."""

    def __init__(self, device: torch.device, plan: Plan | None = None) -> None:
        self.plan, self.spans = plan, list[Span]()
        self.exact = False  # every phase, and not those of a step alone, begins without what the last one freed
        self._gpu = device if device.type == "cuda" else None
        self._began = time.monotonic()
        self._open: list[str] = []
        self._mark = self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to phase `name`. Raises OutOfMemory in place of torch's error."""
        self._cut()
        self._open.append(name)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if (where := _exhausted(error)) is None:
                raise
            self._cut()
            raise OutOfMemory(self._explain(name, where, error), name) from error
        finally:
            self._cut()
            self._open.pop()

    @property
    def doing(self) -> str:
        """The phase that is open, "" between two."""
        return next(iter(self._open[-1:]), "")

    def uses(self, first: int = 0) -> dict[str, PhaseUse]:
        """Each phase since span number `first`, in the order of their beginnings."""
        spans: dict[str, list[Span]] = {}
        for span in sorted(self.spans[first:], key=lambda span: span.start):
            spans.setdefault(span.phase, []).append(span)
        peaks = ("host_peak", "pinned", "gpu_peak", "gpu_reserved")
        return {
            name: PhaseUse(name, sum(s.seconds for s in some), *(max(getattr(s, peak) for s in some) for peak in peaks))
            for name, some in spans.items()
        }

    def peak(self, where: Where) -> int:
        """The largest so far."""
        return max((s.gpu_peak if where == "gpu" else s.host_peak for s in self.spans), default=0)

    def _cut(self) -> None:
        """What has passed since the last cut goes to the phase that is open; the peaks start anew."""
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
        now = time.monotonic()
        if self._open:
            self.spans.append(Span(self._open[-1], self._mark - self._began, now - self._mark, *self._read()))
        if self._gpu:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        if self.exact or (self._open and self._open[-1] not in STEP_PHASES):
            _give_back_freed_memory()
        reset_host_peak()
        self._mark = now

    def _read(self) -> tuple[int, int, int, int, int]:
        peak, end = host_memory()
        if not self._gpu:
            return peak, end, 0, 0, 0
        pinned = int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
        return peak, end, pinned, torch.cuda.max_memory_allocated(self._gpu), torch.cuda.max_memory_reserved(self._gpu)

    def _explain(self, name: str, where: Where, error: BaseException) -> str:
        place = "the card" if where == "gpu" else "host memory"
        planned = {phase.name: phase.bytes_on(where) for phase in self.plan.phases} if self.plan else {}
        plan = f"{planned[name] / GIB:.1f} GiB were planned for it" if name in planned else "no plan covers this phase"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # Python's own MemoryError says nothing
        first, second = RELIEF.get((name, where), RELIEF[("update", where)])
        return (
            f"Out of memory on {place} in phase '{name}': {self.uses()[name].peak(where) / GIB:.1f} GiB were in use, "
            f"{plan}.\n{reason[:200]}\n"
            f"What helps most here: {first}, then {second}.\n"
            f"`{command('select')}` shows what fits this machine."
        )


# The two changes that take most off a phase, by where it ran out.
RELIEF: dict[tuple[str, Where], tuple[str, str]] = {
    ("sample", "gpu"): ("a smaller --generation_batch_size", "a smaller --max_completion_length"),
    ("evaluate", "gpu"): ("a smaller --generation_batch_size", "a smaller --max_completion_length"),
    ("reference", "gpu"): ("--pack_tokens 2048 (smaller parts)", "--reference bf16-cpu, or --beta 0 for none"),
    ("update", "gpu"): ("--gradient_checkpointing true", "--pack_tokens 2048 (fewer completions a backward)"),
    ("initialise", "gpu"): ("a smaller --model", "--ds ds_configs/zero2.json, which keeps the optimizer off the card"),
    ("load", "host"): ("a smaller --model", "closing what else uses the memory"),
    ("initialise", "host"): ("--ds ds_configs/zero2_lowram.json (8 bytes a parameter)", "a smaller --model"),
    ("step", "host"): ("--ds ds_configs/zero2_lowram.json (8 bytes a parameter)", "a smaller --model"),
    ("update", "host"): ("--ds ds_configs/zero2_lowram.json (8 bytes a parameter)", "--gradient_checkpointing true"),
}


def host_memory() -> tuple[int, int]:
    """Bytes resident: the peak since it was last reset, and now. Without Linux's /proc the peak of the whole run."""
    if not STATUS.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak
    fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return peak, now


def reset_host_peak() -> None:
    """host_memory()'s peak starts anew from what is resident now."""
    with suppress(OSError):  # no Linux, or a hardened container: a phase then shows the peak of those before it, too
        CLEAR.write_text(RESET_PEAK, encoding="ascii")


def _give_back_freed_memory() -> None:
    """The C library keeps what was freed in small blocks, on a CPU as much as half a gigabyte of activations, which the
    next phase would carry. Getting it from the system again is not free: a fifth of an update's time on a CPU."""
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _exhausted(error: BaseException) -> Where | None:
    """Which memory an error says is full; None where it says something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "gpu"
    full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return "host" if full else None
