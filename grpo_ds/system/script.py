"""How every command runs: its output, its threads, its errors and its exit code. Does not import torch."""

import os
import sys
from collections.abc import Callable

from grpo_ds.errors import BY_CTRL_C, GrpoError
from grpo_ds.system.streams import output_is_optional, protect
from grpo_ds.terminal import escape_control_chars

# How often a thread of OpenMP looks for the others, at the end of a product, before it sleeps: some 60 microseconds.
# libgomp's own 300,000 (milliseconds) burn a core that a busy neighbour has left, and the thread that everybody waits
# for cannot run there. With 1,000 a step alone became 10 % slower (benchmarks/busy.py, docs/performance.md).
SPINS = 3000


def run_script(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)`. If it raises a GrpoError, rank 0 prints the message and the process exits with its code."""
    sleep_soon()
    protect()
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


def sleep_soon() -> None:
    """Let waiting threads sleep soon, unless the environment says how they wait. Works before torch is loaded."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
