"""Processes that may die: forks of a process that has loaded everything, so that a hundred deaths take a minute.

That process has no threads and joins no ranks. A fork that trains alone joins torch's fake process group, whose
collectives need no threads, so it can be forked again at any moment of a run.
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

FAILED = 70  # exit code of a fork in which an assertion or anything else failed


def warm_process() -> ProcessPoolExecutor:
    """Start the process in which `apart` runs."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_load_everything)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `function` in a fork. Raises AssertionError with the traceback if it fails."""
    code, value = fork(lambda: function(*arguments))
    assert code == 0, f"exit code {code}: {value}"
    return value


def fork(run: Callable[[], Any]) -> tuple[int, Any]:
    """Call `run` in a fork; return its exit code (or minus the signal that killed it) and its result or traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as result:
        if not (pid := os.fork()):
            _do(run, result)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        result.seek(0)
        pickled = result.read()
        return code, pickle.loads(pickled) if pickled else None


def _do(run: Callable[[], Any], result: Any) -> None:
    """Call `run`, write its result, and end this process."""
    code, value = FAILED, None
    try:
        if torch := sys.modules.get("torch"):
            # Renews torch's thread pool, which a fork loses; threads that renew it at the same time can crash.
            torch.set_num_threads(1)
        try:
            code, value = 0, run()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            value = traceback.format_exc()
        pickle.dump(value, result)
        result.flush()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def join_fake_ranks() -> None:
    """Join torch's fake process group as its only rank, in a process that will be forked."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)


def _load_everything() -> None:
    import torch

    import tests.training.test_resume  # noqa: F401

    torch.set_num_threads(1)
