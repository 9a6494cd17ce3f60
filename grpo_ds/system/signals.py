"""Being asked to stop: by SIGTERM or SIGUSR1 (pre-empted), by Ctrl-C, or because the launcher has died.

A run notes the first such signal and ends at its next safe point, where nothing is half done. The deepspeed launcher
sends a second one behind Ctrl-C and kills after 30 seconds, so only a second Ctrl-C a person typed is taken for haste.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from grpo_ds.errors import BY_CTRL_C, PREEMPTED, GrpoError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHERS = {"deepspeed", "torchrun", "accelerate"}  # as scripts, or as modules: deepspeed.launcher.launch
DOUBLE_CLICK = 1.0  # seconds within which two Ctrl-C are one, passed on by the launcher
LOOK_EVERY = 1.0  # seconds between two looks at the launcher


class Stopping(Exception):
    """Raised at a safe point of a run that was asked to stop."""


class Interrupted(GrpoError):
    """A run that ended before its time, with everything saved."""

    opening = ""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code(signum)


class Interruption:
    """The first signal that came, if any."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0

    def check(self) -> None:
        """Raises Stopping once a signal has come; for places where nothing is half done."""
        if self.signum:
            raise Stopping

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Signals are noted instead of obeyed; and the launcher's death is one. In the main thread only."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            with _launcher_watched():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum == number == signal.SIGINT and now - self._since > DOUBLE_CLICK:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._since = number, now
            if os.environ.get("RANK", "0") == "0":
                line = f"{name(number)}: saving at the next safe point; Ctrl-C twice ends it now, unsaved.\n"
                os.write(sys.stderr.fileno(), line.encode())  # a print may have been interrupted itself


def name(number: int) -> str:
    return signal.Signals(number).name


def exit_code(number: int) -> int:
    return BY_CTRL_C if number == signal.SIGINT else PREEMPTED


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Where there is nothing to save, a signal ends the process with its exit code and no traceback.

    At once: an exception raised in the middle of an import would be taken for a failed import by some library. After
    it signals are ignored, for the process is about to end with an exit code that a second one must not replace.
    """

    def leave(number: int, _: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(sys.stderr.fileno(), f"{name(number)}: stopped; there was nothing to save here.\n".encode())
        os._exit(exit_code(number))

    for number in SIGNALS:
        signal.signal(number, leave)
    try:
        with _launcher_watched():  # it may die while a model is loaded, too
            yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _launchers() -> list[psutil.Process]:
    """Those above this process that started it to train: deepspeed's two, torchrun, accelerate."""
    found = []
    for parent in psutil.Process().parents():
        try:
            words = [Path(word).name for word in parent.cmdline()]
        except psutil.Error:
            break
        if not any(word.split(".")[0] in LAUNCHERS or word.startswith("torch.distributed") for word in words[:4]):
            break
        found.append(parent)
    return found


@contextmanager
def _launcher_watched() -> Iterator[None]:
    over = threading.Event()
    threading.Thread(target=_watch, args=(_launchers(), over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(launchers: list[psutil.Process], over: threading.Event) -> None:
    """A launcher that was killed cannot tell its children."""
    while launchers and not over.wait(LOOK_EVERY):
        if not all(map(_alive, launchers)):
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
