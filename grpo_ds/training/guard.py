"""The guard: one object that runs a piece of work on every rank and handles everything around it.

`guard.run("sample", collect, step, questions)` measures the work as a phase, lets a signal stop it where that is safe,
makes a failure on one rank a failure on all, and tries again with smaller limits after an out-of-memory error.
"""

import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

from grpo_ds.errors import RewardError
from grpo_ds.memory.phases import OutOfMemory, Profiler
from grpo_ds.system.ranks import World
from grpo_ds.system.signals import Interruption, SecondCtrlC, Stopping

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# No rank waits for another inside these phases, so a stop or a failure on one rank can end the work of all.
WITHOUT_EXCHANGE = {"sample", "evaluate"}
# These phases may be tried again with smaller limits: they change nothing before they have succeeded.
RETRIED = {"sample", "reference", "update"}


class Guard:
    """Runs the work of a trainer, phase by phase."""

    def __init__(
        self, world: World, profiler: Profiler, interruption: Interruption, *, shrink: Callable[[str], bool]
    ) -> None:
        """shrink: reduces how much a phase computes at once; returns False if nothing can be reduced."""
        self.world, self.profiler, self.interruption, self._shrink = world, profiler, interruption, shrink
        self._may_stop = False

    def run(
        self, phase: str, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return work(*args, **kwargs); every rank calls it.

        Raises Stopping if any rank was asked to stop in a phase without exchange, OutOfMemory instead of torch's
        error, and a GrpoError if another rank raised one.
        """
        if phase not in WITHOUT_EXCHANGE:
            return self._attempt(phase, lambda: work(*args, **kwargs))
        return self._on_all_ranks(lambda: self._attempt(phase, lambda: work(*args, **kwargs)))

    def safe_point(self) -> None:
        """End the run here if any rank was asked to stop; nothing is half done between two calls of `run`."""
        self._on_all_ranks(self.interruption.check)

    def poll(self) -> None:
        """Raise Stopping inside a phase without exchange once this rank was asked to stop; cheap, for inner loops."""
        if self._may_stop:
            self.interruption.check()

    def _attempt(self, phase: str, work: Callable[[], Result]) -> Result:
        while True:
            try:
                with self.profiler.phase(phase):
                    return work()
            except OutOfMemory as error:
                # Repeat only after this phase's own error, not an inner phase's, and only with one rank.
                if phase not in RETRIED or error.phase != phase or self.world.size > 1 or not self._shrink(phase):
                    raise
            # Not in the except block: there the error's traceback holds the tensors that filled the memory.
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    def _on_all_ranks(self, work: Callable[[], Result]) -> Result:
        self._may_stop = True
        try:
            result, signum = self.world.run_on_all_ranks(
                lambda: self._none_if_stopping(work),
                signum=lambda: self.interruption.signum,  # read after the work: a signal may have come meanwhile
            )
        finally:
            self._may_stop = False
        if signum:  # known to all ranks; a signal that came since then waits for the next safe point
            self.interruption.signum = self.interruption.signum or signum
            raise Stopping
        return cast(Result, result)

    def _none_if_stopping(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except Stopping:
            return None
        except (RewardError, KeyboardInterrupt) as error:
            # Ctrl-C also reaches the processes that a reward function has started, and it fails without them.
            if not self.interruption.signum or isinstance(error, SecondCtrlC):
                raise
            return None  # resuming repeats the step
