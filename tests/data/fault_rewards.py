"""Reward functions for the tests of faults: one that is well, and ones that break in the middle of a run."""

import os
import time
from pathlib import Path


def uneven(completions, **_):
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


def faulty(completions, **_):
    """As uneven, until FAULT_AT calls are made; then what FAULT says, if it is set."""
    faulty.calls += 1
    fault = os.environ.get("FAULT") if faulty.calls >= int(os.environ.get("FAULT_AT", "0")) else None
    if fault == "raises":
        raise KeyError("a column that was never there")
    if fault == "hangs":
        time.sleep(600)
    if fault == "ends the process":
        raise SystemExit(3)
    if fault == "waits":  # until the test has done what it wants to do at this moment
        waiting = Path(os.environ["FAULT_FILE"])
        waiting.touch()
        while waiting.exists():
            time.sleep(0.05)
    return uneven(completions)[: -1 if fault == "is short" else None]


faulty.calls = 0
