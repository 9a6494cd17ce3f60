"""Reward functions for the fault tests: a good one, and one that fails in the middle of a run."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy
import torch


class NoException(BaseException):
    pass


RAISED = {
    "raises": KeyError("a column that is not there"),
    "ends the process": SystemExit(3),
    "is cancelled": asyncio.CancelledError("by a library"),
    "raises no Exception": NoException("of its own"),
    "raises KeyboardInterrupt": KeyboardInterrupt("of a worker"),
}
ENTERED = []  # contexts that are never left


def disturb():
    """Change everything that a run relies on."""
    os.chdir("/")
    os.umask(0o777)
    os.environ |= {"RANK": "7", "WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "none"}
    sys.argv[1:] = ["--other"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    warnings.simplefilter("error")
    numpy.seterr(all="raise")
    sys.stdout.close()
    sys.stderr = None
    torch.set_grad_enabled(False)
    ENTERED.append(torch.inference_mode())
    ENTERED[-1].__enter__()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    ENTERED.append(torch.device("meta"))
    ENTERED[-1].__enter__()
    ENTERED.append(torch.autocast("cpu", dtype=torch.float16))
    ENTERED[-1].__enter__()
    torch.backends.mkldnn.enabled = False
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")


if os.environ.get("FAULT") == "disturbs":
    disturb()


def uneven(completions, **_):
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


def faulty(completions, **_):
    """Like `uneven`; from call number FAULT_AT on (0: the trial), fail in the way that FAULT names, if it is set."""
    faulty.calls += 1
    fault = os.environ.get("FAULT") if faulty.calls >= int(os.environ.get("FAULT_AT", "0")) else None
    if fault in RAISED:
        raise RAISED[fault]
    if fault == "disturbs":
        disturb()
    if fault == "is interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("a worker process has ended")
    if fault == "deletes the folder" and faulty.calls == int(os.environ["FAULT_AT"]):
        shutil.rmtree(os.environ["FAULT_FILE"])
    if fault == "hangs":
        time.sleep(600)
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


faulty.calls = -1
