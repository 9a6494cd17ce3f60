"""The ranks of a run and their exchanges: sums, objects, barriers. One process alone exchanges nothing.

Works under `deepspeed`, `accelerate launch`, `torchrun` and plain `python`, which set different rendezvous variables.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ds.errors import GrpoError, UsageError
from grpo_ds.system.allocator import use_expandable_segments

Result = TypeVar("Result")
_own = False  # True: `start` made the process group, so that `stop` may end it


@dataclass(frozen=True, slots=True)
class World:
    """This process and its peers.

    Example: the second of two processes on one machine
        World(rank=1, size=2, device=torch.device("cuda", 1))
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def free_gpu_gib(self) -> float | None:
        """GPU memory that CUDA has left for this process, in GiB; None on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] / 2**30 if self.device.type == "cuda" else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over ranks, returned on every rank, on the tensor's own device."""
        if self.size == 1:
            return tensor
        summed = tensor.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def largest(self, number: int) -> int:
        """Largest number of all ranks, returned on every rank."""
        return max(self.gather(number))

    def gather(self, value: Any) -> list[Any]:
        """Values of all ranks in order of rank, returned on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def run_on_all_ranks(
        self, run: Callable[[], Result], *, signum: Callable[[], int] = lambda: 0
    ) -> tuple[Result, int]:
        """Call `run` on every rank; return its result and the signal that any rank has received so far, or 0.

        `run` must not wait for other ranks. If it raises a GrpoError on one rank, all ranks raise one, so that no rank
        waits for ever.
        """
        result, own = None, None
        try:
            result = run()
        except GrpoError as error:
            own = error
        others = self.gather((signum(), own and (own.exit_code, str(own))))
        failed = next((failure for _, failure in others if failure), None)
        if failed is not None:
            everywhere = own or GrpoError(failed[1])
            everywhere.exit_code, everywhere.on_every_rank = failed[0] if own is None else own.exit_code, True
            raise everywhere
        return cast(Result, result), max(number for number, _ in others)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier()


def start(*, needs_gpu: bool = False) -> World:
    """Join the process group; without a launcher the group is this process alone.

    needs_gpu: the model was chosen for a GPU, so this torch must be able to use it. Raises UsageError if it cannot.
    """
    has_gpu = torch.cuda.is_available()
    if needs_gpu and not has_gpu:
        raise UsageError(
            "There is a graphics card, but this torch cannot use it (torch.cuda.is_available() is False).\n"
            f"torch {torch.__version__} is installed; install a CUDA build that fits the driver,\n"
            "or train on the CPU: CUDA_VISIBLE_DEVICES= with --model smollm2-135m."
        )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:  # two runs on one machine need different ports
        os.environ["MASTER_PORT"] = str(_free_port())
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        use_expandable_segments()
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if has_gpu else "gloo")
        global _own
        _own = True
    return World(dist.get_rank(), dist.get_world_size(), device)


def is_ours() -> bool:
    """Return True if `start` made the process group, False for one that a script had before, or none."""
    return _own and dist.is_initialized()


def stop() -> None:
    """Leave the process group, unless a script had it before `start`."""
    global _own
    if is_ours():
        dist.destroy_process_group()
    _own = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
