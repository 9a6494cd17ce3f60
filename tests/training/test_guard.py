"""The guard: a piece of work is a phase, may be stopped, fails on all ranks, and is tried again with less memory."""

import signal
from dataclasses import dataclass

import pytest
import torch

from grpo_ds.errors import DataError, GrpoError, RewardError
from grpo_ds.memory.phases import OutOfMemory, Profiler
from grpo_ds.system.ranks import World
from grpo_ds.system.signals import Interruption, Stopping
from grpo_ds.training.guard import Guard

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


@dataclass(frozen=True)
class TwoRanks(World):
    """This process and another rank, which has got `signum` or failed with (exit code, message)."""

    signum: int = 0
    failure: tuple[int, str] | None = None

    def gather(self, value):
        return [value, (self.signum, self.failure)]


def make_guard(world=None, shrinks=0):
    """A guard whose limits can be made smaller `shrinks` times, and the phases that it made smaller."""
    shrunk: list[str] = []

    def shrink(phase):
        if len(shrunk) == shrinks:
            return False
        shrunk.append(phase)
        return True

    world = world or World(0, 1, CPU)
    return Guard(world, Profiler(CPU), Interruption(), shrink=shrink), shrunk


def fails_before(calls):
    """Work that runs out of memory in its first `calls` calls."""
    left = [calls]

    def work(value):
        left[0] -= 1
        if left[0] >= 0:
            raise FULL
        return value

    return work


def test_work_is_measured_as_a_phase_and_gets_its_arguments():
    guard, _ = make_guard()
    assert guard.run("update", lambda one, *, two: (one, two), 1, two=2) == (1, 2)
    assert list(guard.profiler.uses()) == ["update"]


@pytest.mark.parametrize("phase", ["sample", "reference", "update"])
def test_a_phase_out_of_memory_is_tried_again_with_smaller_limits(phase):
    guard, shrunk = make_guard(shrinks=3)
    assert guard.run(phase, fails_before(2), "done") == "done"
    assert shrunk == [phase, phase]


@pytest.mark.parametrize(
    ("phase", "shrinks"),
    [
        ("update", 1),  # the limits cannot be made smaller again
        ("save", 9),  # half a checkpoint is no reason to write another half
        ("initialise", 9),
    ],
)
def test_out_of_memory_is_raised_by_phase_where_a_second_try_cannot_help(phase, shrinks):
    guard, _ = make_guard(shrinks=shrinks)
    with pytest.raises(OutOfMemory) as error:
        guard.run(phase, fails_before(2), "done")
    assert error.value.phase == phase


def test_an_inner_phase_out_of_memory_is_not_repeated_by_the_outer_one():
    """The optimizer step inside an update may have moved weights already."""
    guard, shrunk = make_guard(shrinks=9)
    with pytest.raises(OutOfMemory, match="step"):
        guard.run("update", lambda: guard.run("step", fails_before(1), "done"))
    assert not shrunk


def test_one_rank_of_several_does_not_try_again_alone():
    guard, shrunk = make_guard(TwoRanks(0, 2, CPU), shrinks=9)
    with pytest.raises(OutOfMemory):
        guard.run("sample", fails_before(1), "done")
    assert not shrunk


def test_a_signal_stops_sampling_at_the_next_token_and_an_update_not_at_all():
    guard, _ = make_guard()

    def asked_to_stop():
        guard.interruption.signum = signal.SIGTERM
        guard.poll()
        return "finished"

    assert guard.run("update", asked_to_stop) == "finished"
    with pytest.raises(Stopping):
        guard.run("sample", asked_to_stop)
    with pytest.raises(Stopping):
        guard.safe_point()


@pytest.mark.parametrize(
    ("signum", "failure", "raised"),
    [(signal.SIGTERM, None, Stopping), (0, (3, "record 7 has no answer"), GrpoError)],
)
def test_a_signal_or_a_failure_on_another_rank_ends_the_work_here(signum, failure, raised):
    guard, _ = make_guard(TwoRanks(0, 2, CPU, signum, failure))
    with pytest.raises(raised) as error:
        guard.run("evaluate", lambda: "answers")
    if failure:
        assert str(error.value) == failure[1] and error.value.exit_code == DataError.exit_code
    else:
        assert guard.interruption.signum == signum


def test_a_reward_that_fails_after_a_signal_is_a_run_that_was_asked_to_stop():
    def fails():
        raise RewardError("its worker processes ended")

    guard, _ = make_guard()
    with pytest.raises(RewardError):
        guard.run("sample", fails)
    guard.interruption.signum = signal.SIGINT
    with pytest.raises(Stopping):
        guard.run("sample", fails)
