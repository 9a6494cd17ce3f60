"""Errors a person can cause or meet: a message of at most six lines and an exit code, no traceback.

A command prints the message of a GrpoError to stderr and exits with its code; anything else is our bug
and keeps its traceback. `one_error` gathers all that is wrong into one error, because fixing five
mistakes in five runs is four runs too many.
"""

import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from grpo_ds.terminal import escape_control_chars

BY_CTRL_C, PREEMPTED = 130, 75  # exit codes of a run that was asked to stop; 75 is sysexits' "try again"
MAX_LINES = 6  # what still reads at a glance in a terminal full of launcher output


class GrpoError(Exception):
    """What went wrong, where, and what to do. Subclasses fix the exit code."""

    exit_code = 1
    opening = "Error: "
    on_every_rank = False  # all ranks raise it, at the same place


class UsageError(GrpoError):
    """A flag, a YAML file, a DeepSpeed JSON or an output folder that cannot work."""

    exit_code = 2


class DataError(GrpoError):
    """A data file or a record that cannot be used."""

    exit_code = 3


class CheckpointError(GrpoError):
    """A checkpoint that cannot be written, or a run that cannot be resumed."""

    exit_code = 4


class NumbersError(GrpoError):
    """Numbers that are not finite, or not what they must be: trying again as it is gives the same."""

    exit_code = 6


class PreflightError(NumbersError):
    """What would spoil the training, found before its first step. Numbers are wrong, so it has their exit code."""


class RewardError(GrpoError):
    """A reward function that failed while it judged completions."""

    exit_code = 7


def one_error(error_type: type[GrpoError], headline: str, problems: Sequence[str], remedy: str = "") -> GrpoError:
    """One error from many problems: headline, as many problems as fit, how many more, remedy."""
    room = MAX_LINES - 1 - bool(remedy)
    shown = list(problems) if len(problems) <= room else list(problems[: room - 1])
    if len(shown) < len(problems):
        shown.append(f"... and {len(problems) - len(shown)} more")
    return error_type("\n".join([headline, *(f"  {line}" for line in shown), *([remedy] if remedy else [])]))


def run_script(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)`; a GrpoError ends in its message and exit code, said by the first rank alone."""
    for stream in (sys.stdout, sys.stderr):  # a model writes what a terminal in Latin-1 has no sign for
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except GrpoError as error:
        rank = os.environ.get("RANK", "0")
        message = f"{error.opening}{error}" if rank == "0" else f"[rank {rank}] {str(error).splitlines()[0]}"
        print(escape_control_chars(message), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        sys.exit(BY_CTRL_C)
