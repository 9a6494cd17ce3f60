"""Reward functions for the fault tests: a good one, and one that fails in the middle of a run."""

import os
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


def uneven(completions, **_):
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


def faulty(completions, **_):
    """Like `uneven`; from call number FAULT_AT on, fail in the way that FAULT names, if it is set."""
    faulty.calls += 1
    fault = os.environ.get("FAULT") if faulty.calls >= int(os.environ.get("FAULT_AT", "0")) else None
    if fault == "raises":
        raise KeyError("a column that is not there")
    if fault == "hangs":
        time.sleep(600)
    if fault == "ends the process":
        raise SystemExit(3)
    if fault == "waits":  # until the test deletes the file
        waiting = Path(os.environ["FAULT_FILE"])
        waiting.touch()
        while waiting.exists():
            time.sleep(0.05)
    if fault == "Ctrl-C in a pool":  # as a terminal sends it: to all processes of the group
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            pool.submit(os.killpg, 0, signal.SIGINT).result()
    if fault == "Ctrl-C in a program":
        subprocess.run(["sh", "-c", "kill -INT 0; sleep 60"], check=True)
    return uneven(completions)[: -1 if fault == "is short" else None]


faulty.calls = 0
