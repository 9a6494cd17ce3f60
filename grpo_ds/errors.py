"""Errors that users can cause or see: a message of at most six lines and an exit code, no traceback.

A command prints the message of a GrpoError to stderr and exits with its code; any other exception is our bug and
keeps its traceback. `one_error` puts all mistakes into one error, so that finding five of them does not take five runs.
"""

from collections.abc import Sequence

BY_CTRL_C, PREEMPTED = 130, 75  # exit codes of a run that was asked to stop; 75 is sysexits' "try again"
MAX_LINES = 6  # easy to read between lines of the launcher


class GrpoError(Exception):
    """Base of our errors: the message says what is wrong, where, and what to do; subclasses set the exit code."""

    exit_code = 1
    opening = "Error: "
    on_every_rank = False  # True: all ranks raise it at the same place


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
    """Numbers that are not finite or not correct; the same run again gives the same error."""

    exit_code = 6


class PreflightError(NumbersError):
    """A failed check before the first step. It has the exit code of wrong numbers."""


class RewardError(GrpoError):
    """A reward function that failed."""

    exit_code = 7


def in_one_line(error: Exception, most: int = 200) -> str:
    """Return another library's message as one line of at most `most` characters, for a message of ours."""
    said = " ".join(str(error).split())
    return (said if len(said) <= most else said[: most - 4].rsplit(" ", 1)[0] + " ...") or type(error).__name__


def one_error(error_type: type[GrpoError], headline: str, problems: Sequence[str], remedy: str = "") -> GrpoError:
    """Make one error of many problems: headline, the problems that fit, the number of others, remedy."""
    room = MAX_LINES - 1 - bool(remedy)
    shown = list(problems) if len(problems) <= room else list(problems[: room - 1])
    if len(shown) < len(problems):
        shown.append(f"... and {len(problems) - len(shown)} more")
    return error_type("\n".join([headline, *(f"  {line}" for line in shown), *([remedy] if remedy else [])]))
