"""How every command runs: its output, its threads, its errors and its exit code. Does not import torch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from grpo_ds.errors import BY_CTRL_C, GrpoError
from grpo_ds.system.busy_machine import watch_cores
from grpo_ds.system.streams import output_is_optional, protect
from grpo_ds.terminal import escape_control_chars

BY_ACCELERATE, BY_TORCHRUN = "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"  # set by the launcher, always


def run_script(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)`. If it raises a GrpoError, rank 0 prints the message and the process exits with its code."""
    divide_cores()
    protect()
    watch_cores()  # opens files, which must not get the numbers of closed streams
    try:
        _call(main)
    except GrpoError as error:
        rank = os.environ.get("RANK", "0")
        message = f"{error.opening}{error}" if rank == "0" else f"[rank {rank}] {str(error).splitlines()[0]}"
        print(escape_control_chars(message), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        sys.exit(BY_CTRL_C)
    finally:
        output_is_optional()  # an error was reported, and the buffers try again at exit


def _call(main: Callable[[list[str]], None]) -> None:
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        if end.code:
            raise
    print(end="", flush=True)  # here a full disk is an error; --help, too, has printed


def divide_cores() -> None:
    """Give each rank its share of this machine's cores, unless the user chose a number. Works before torch is loaded.

    accelerate writes OMP_NUM_THREADS=1 for every process, torchrun for several: the optimizer in RAM would use one
    core. A 1 that the user has set under these launchers looks the same.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))  # on this machine
    threads = os.environ.get("OMP_NUM_THREADS")
    by_launcher = BY_ACCELERATE in os.environ or (BY_TORCHRUN in os.environ and ranks > 1)
    if threads is not None and not (threads == "1" and by_launcher):
        return
    os.environ.pop("OMP_NUM_THREADS", None)  # torch then takes all cores
    if ranks > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, _cores() // ranks))


def _cores() -> int:
    """Cores that this process may use; two hardware threads of one core count once, as in torch."""
    files = {n: Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in os.sched_getaffinity(0)}
    return len({file.read_text(encoding="utf-8") if file.is_file() else str(n) for n, file in files.items()})
