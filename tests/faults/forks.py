"""Processes that may die: forked from one in which everything is loaded, so that a hundred deaths take a minute.

That one runs no threads and joins no ranks. A fork of it that trains alone joins the ranks that torch makes up for
tests, whose collectives need no threads: it can be forked again at any moment of a run.
"""

import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

FAILED = 70  # of a fork in which an assertion failed, or anything else


def warm_process() -> ProcessPoolExecutor:
    """What `apart` is handed to."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_load_everything)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a fork of this process. Raises AssertionError with the traceback where it raises."""
    code, value = fork(lambda: function(*arguments))
    assert code == 0, f"exit code {code}: {value}"
    return value


def fork(run: Callable[[], Any]) -> tuple[int, Any]:
    """How a fork of this process that does `run` ended: its exit code, or minus the signal that killed it; and what it
    returned, or the traceback of what it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as answer:
        if not (pid := os.fork()):
            _do(run, answer)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer.seek(0)
        told = answer.read()
        return code, pickle.loads(told) if told else None


def _do(run: Callable[[], Any], answer: Any) -> None:
    """Never returns."""
    code, value = FAILED, None
    try:
        try:
            code, value = 0, run()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            value = traceback.format_exc()
        pickle.dump(value, answer)
        answer.flush()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def join_made_up_ranks() -> None:
    """One rank, in a process that will be forked."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)


def _load_everything() -> None:
    import torch

    import tests.training.test_resume  # noqa: F401

    torch.set_num_threads(1)
