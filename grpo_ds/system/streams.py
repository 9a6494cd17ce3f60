"""Standard streams that a run survives: its reader has died, the disk is full, the terminal is gone.

Python raises the error of a write wherever a buffer is flushed: in a library, in a log line, at exit. So errors end
below the buffers, in `Raw`, and everything above (print, rich, tqdm, logging) goes on. Most commands are asked for
their output: there a write to stdout that fails ends the command. A run is asked for files: it calls
`output_is_optional` and loses the text alone.
"""

import errno
import io
import os
import signal
import sys
from contextlib import suppress
from select import select

from grpo_ds.errors import UsageError

STDOUT, STDERR = 1, 2
FULL = "Free some space, or write it elsewhere: > FILE."
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    errno.EBADF: "It was closed by whatever started this command (>&-); leave it open, or write to a file: > FILE.",
}
READER_GONE = 128 + signal.SIGPIPE  # exit code of a command whose reader has ended, as shells show it


class Raw(io.FileIO):
    """The descriptor of a standard stream. needed: a write that fails raises."""

    def __init__(self, descriptor: int, *, needed: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = f"<{'stdout' if descriptor == STDOUT else 'stderr'}>"
        self.needed, self._failed = needed, False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write all of `data`; what cannot be written is lost. Raises SystemExit or UsageError if it is needed."""
        left = memoryview(data)
        try:
            while left:
                if written := super().write(left):
                    left = left[written:]
                else:  # another program has made the terminal non-blocking, and it is busy
                    select([], [self], [])
        except OSError as error:
            self._fail(error)
        return len(data)

    def _fail(self, error: OSError) -> None:
        first, self._failed = not self._failed, True
        if self.needed and isinstance(error, BrokenPipeError):
            raise SystemExit(READER_GONE)
        if self.needed:
            raise UsageError(
                f"Standard output cannot be written: {error.strerror}. What was written is not complete.\n"
                f"{REMEDIES.get(error.errno or 0, 'Write it elsewhere: > FILE.')}"
            )
        if self.fileno() == STDOUT and first:
            say_at_once(f"Standard output cannot be written ({error.strerror}); the run continues.")


class Text(io.TextIOWrapper):
    """A stream like `like` over Raw; characters that a Latin-1 terminal cannot show are escaped."""

    def __init__(self, raw: Raw, like: io.TextIOWrapper | None) -> None:
        self.raw = raw
        unbuffered = like and isinstance(like.buffer, io.RawIOBase)  # python -u, as launchers start it
        super().__init__(
            raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var, arg-type]
            encoding=like.encoding if like else "utf-8",
            errors="backslashreplace",
            line_buffering=like.line_buffering if like else True,
            write_through=like.write_through if like else False,
        )

    def close(self) -> None:
        """Only flush: others still print."""
        self.flush()


def protect() -> None:
    """Let stdout and stderr write through Raw, unless they are replaced; open what the caller has closed."""
    # A closed one would be None, and the next file that is opened would get its number. Writing to this one fails.
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is sys.__stdout__:
        sys.stdout = Text(Raw(STDOUT, needed=True), sys.__stdout__)
    if sys.stderr is sys.__stderr__:
        sys.stderr = Text(Raw(STDERR, needed=False), sys.__stderr__)


def output_is_optional() -> None:
    """Let a write to stdout that fails lose only its text, from now on."""
    if isinstance(sys.stdout, Text):
        sys.stdout.raw.needed = False


def say_at_once(line: str) -> None:
    """Write a line to stderr past all buffers. It never raises, so a signal handler may call it before it exits."""
    with suppress(OSError):
        os.write(STDERR, f"{line}\n".encode())
