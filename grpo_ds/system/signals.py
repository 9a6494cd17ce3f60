"""Stop requests: SIGTERM or SIGUSR1 (pre-empted), SIGHUP (its terminal was closed), Ctrl-C, or a launcher that died.

A run notes the first such signal and ends at its next safe point, where nothing is half done. The deepspeed launcher
forwards Ctrl-C a second time and kills after 30 seconds, so only a second Ctrl-C from the user ends it at once.
Processes that the run forks, as a reward function may, obey signals as usual.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from grpo_ds.errors import BY_CTRL_C, PREEMPTED, GrpoError
from grpo_ds.system.streams import say_at_once

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]
LAUNCHERS = {"deepspeed", "torchrun", "accelerate"}  # as scripts, or as modules: deepspeed.launcher.launch
PARENT = "GRPO_DS_PARENT"  # in the environment: the process whose command starts this one (--num_seeds)
SAME_CTRL_C = 1.0  # seconds: two Ctrl-C within this time are one, forwarded by the launcher
CHECK_EVERY = 1.0  # seconds between two checks of the launcher


class Stopping(Exception):
    """Raised at a safe point of a run that was asked to stop."""


class SecondCtrlC(KeyboardInterrupt):
    """Raised by the user's second Ctrl-C, which ends the run at once."""


class Interrupted(GrpoError):
    """A run that was stopped, with everything saved."""

    opening = ""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code(signum)


class Interruption:
    """Holds the first stop signal that arrived, if any."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0

    def check(self) -> None:
        """Raise Stopping if a signal has arrived. Call it at safe points, where nothing is half done."""
        if self.signum:
            raise Stopping

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals instead of ending at once; the launcher's death counts as a signal.

        Python handles signals in the main thread alone: in another one nothing is noted.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = _handle(self._note)
        try:
            with _launcher_watched():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum == number == signal.SIGINT and now - self._since > SAME_CTRL_C:
            raise SecondCtrlC
        if not self.signum:
            self.signum, self._since = number, now
            if os.environ.get("RANK", "0") == "0":
                sent = "Ctrl-C" if number == signal.SIGINT else name(number)
                how = "; press Ctrl-C again to end now without saving" if number == signal.SIGINT else ""
                # By a thread: the signal may have interrupted a write, and the reader of ours may be gone or slow.
                with suppress(RuntimeError):  # no more threads
                    start_new_thread(_say, (f"{sent}: saving at the next safe point{how}.",))


def _say(line: str) -> None:
    with suppress(Exception):  # a user's function may have replaced the stream
        print(line, file=sys.stderr, flush=True)


def _handle(handler: Handler) -> dict[int, Any]:
    """Install a handler of stop signals; return those before it. Under nohup SIGHUP stays ignored."""
    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    _handlers.append(handler)
    return {number: signal.signal(number, handler) for number in numbers}


def _before_fork() -> None:
    """Let signals wait during a fork, or one that is sent to the child at once would meet the run's handler."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _default_in_child() -> None:
    """Undo `_handle` in a forked process: nobody there looks at what was noted."""
    for number in SIGNALS:
        if signal.getsignal(number) in _handlers:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _after_fork()


_handlers: list[Handler] = []  # all that were installed
_forking = threading.local()
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_default_in_child)


def name(number: int) -> str:
    """Name of a signal, such as SIGTERM."""
    return signal.Signals(number).name


def exit_code(number: int) -> int:
    """Exit code of a process that a signal ended."""
    return BY_CTRL_C if number == signal.SIGINT else PREEMPTED


@contextmanager
def exit_on_signal(leaving: Callable[[], None] = lambda: None) -> Iterator[None]:
    """End the process at a signal, with its exit code and no traceback; for code that has nothing to save.

    leaving: called before, as no `finally` is reached.
    It raises no exception: some libraries would take it for a failed import. After the block signals are ignored: the
    process is about to end, and a second signal must not replace its exit code.
    """

    def leave(number: int, _: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            say_at_once(f"{name(number)}: stopped; there was nothing to save.")
        leaving()
        os._exit(exit_code(number))

    _handle(leave)
    try:
        with _launcher_watched():  # the launcher may also die while a model is loaded
            yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def pass_signals_on(command: list[str]) -> int:
    """Run a command to its end, and hand on the stop signals that arrive; return its exit code."""
    child: list[subprocess.Popen[bytes]] = []
    early: list[int] = []
    before = _handle(lambda number, _: child[0].send_signal(number) if child else early.append(number))
    try:
        child.append(subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())}))
        for number in early:
            child[0].send_signal(number)
        code = child[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _launchers() -> list[psutil.Process]:
    """Parent processes that launched this one: deepspeed's two, torchrun, accelerate, our own command."""
    found = []
    for parent in psutil.Process().parents():
        try:
            words = [Path(word).name for word in parent.cmdline()]
        except psutil.Error:
            break
        is_ours = str(parent.pid) == os.environ.get(PARENT)
        if not is_ours and not any(
            word.split(".")[0] in LAUNCHERS or word.startswith("torch.distributed") for word in words[:4]
        ):
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
    """Send SIGTERM to this process when a launcher is gone: a killed launcher cannot signal its children."""
    while launchers and not over.wait(CHECK_EVERY):
        if not all(map(_alive, launchers)):
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
