"""How every command runs: its output, its threads, its errors and its exit code. Does not import torch."""

import os
import sys
from collections.abc import Callable

from grpo_ds.errors import BY_CTRL_C, GrpoError
from grpo_ds.system.busy_machine import watch_cores
from grpo_ds.system.streams import output_is_optional, protect
from grpo_ds.terminal import escape_control_chars


def run_script(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)`. If it raises a GrpoError, rank 0 prints the message and the process exits with its code."""
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
