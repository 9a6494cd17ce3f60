"""How long the threads of a product wait for each other: as libgomp says, and shorter while the machine is busy.

OpenMP's threads meet at the end of every product. libgomp's look 300,000 times (milliseconds) before they sleep, which
is the fastest way on a free machine. On a busy one it burns the core that the awaited thread could run on.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # a user who sets one of them has chosen
TASKS = Path("/proc/self/task")
INTERVAL = 0.5  # seconds
# Seconds that the threads of this process waited for a core, per second: 0.01 on a free machine of two cores, 0.6 and
# more beside one busy process (measured, waiting either way).
BUSY, FREE = 0.25, 0.1
GRAIN = 32768  # elements that torch gives a thread at least


def watch_cores() -> None:
    """Make waiting threads sleep soon whenever other programs want the cores. Works on Linux, with libgomp."""
    if TASKS.is_dir() and not os.environ.keys() & SETTINGS:
        threading.Thread(target=_watch, name="watch_cores", daemon=True).start()


def _watch() -> None:
    sleepy: SleepyThreads | None = None
    for busy in _busy_intervals():
        if sleepy is None and busy > BUSY and "torch" in sys.modules:
            sleepy = SleepyThreads()
        elif sleepy is not None and busy < FREE:
            sleepy.end()
            sleepy = None


def _busy_intervals() -> Iterator[float]:
    """Yield, after each interval, the seconds that threads waited for a core, per second."""
    before, at = seconds_waited(), time.monotonic()
    while True:
        time.sleep(INTERVAL)
        waited, now = seconds_waited(), time.monotonic()
        yield (waited - before) / (now - at)
        before, at = waited, now


def seconds_waited(tasks: Path = TASKS) -> float:
    """Seconds that the living threads of a process were ready to run and had no core; 0 where Linux does not count."""
    waited = 0
    for file in tasks.glob("*/schedstat"):
        try:
            waited += int(file.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended
            continue
    return waited / 1e9


class SleepyThreads:
    """While one exists, libgomp's threads look 100 times before they sleep. Products are split as before: same numbers.

    libgomp does so by itself where it manages more threads than there are cores (`gomp_throttled_spin_count_var` in
    its wait.h). Here a second team of threads makes them more; it sleeps until `end`.
    """

    def __init__(self) -> None:
        self._end = threading.Event()
        made = threading.Event()
        threading.Thread(target=self._sleep, args=(made,), name="sleepy_threads", daemon=True).start()
        made.wait()

    def _sleep(self, made: threading.Event) -> None:
        import torch

        torch.zeros(GRAIN * torch.get_num_threads()).add_(1)  # in parallel: this thread has its team now
        made.set()
        self._end.wait()  # the team ends with the thread

    def end(self) -> None:
        """Let them look as long as libgomp says again."""
        self._end.set()
