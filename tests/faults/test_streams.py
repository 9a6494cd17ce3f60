"""Output that breaks: no write to a console or log ends a run or keeps a checkpoint from being saved."""

import errno
import io
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from select import select

import pytest

from grpo_ds.report.trackers import JsonLines
from grpo_ds.run_folder.checkpoints import found_in
from grpo_ds.run_folder.status import RunStatus
from tests.faults.file_operations import fail, no_file_over
from tests.faults.forks import fork
from tests.faults.launched import flags, result, same, status, train
from tests.faults.test_interrupted import at

Break = Callable[[], None]


def write_to(descriptor: int) -> None:
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def full_disk() -> Break:
    write_to(os.open("/dev/full", os.O_WRONLY))
    return lambda: None


def closed() -> Break:
    os.close(1)
    os.close(2)
    return lambda: None


def pipe() -> Break:
    """Output to a pipe; the result ends its reader, as Ctrl-C ends `tee`."""
    return _read(*os.pipe())


def terminal() -> Break:
    """Output to a terminal, with the live view; the result closes it."""
    os.environ["TERM"] = "xterm"
    return _read(*os.openpty())


def _read(reader: int, writer: int) -> Break:
    write_to(writer)
    os.close(writer)
    over = threading.Event()

    def read() -> None:
        while not over.wait(0.01):
            if select([reader], [], [], 0)[0]:
                os.read(reader, 65536)
        os.close(reader)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


# Kind of output -> the signal that a person's hands send with it.
OUTPUTS = {full_disk: signal.SIGTERM, closed: signal.SIGTERM, pipe: signal.SIGINT, terminal: signal.SIGHUP}


def broken(output: Callable[[], Break], signum: int) -> None:
    """Break the output in the second rollout, then send the signal, if any."""
    breaks = output()

    def act() -> None:
        breaks()
        if signum:
            os.kill(os.getpid(), signum)

    at("sample", 2, act)


def broken_and_stopped(model: Path, folder: Path, straight: Path, output: Callable[[], Break]) -> None:
    run, signum = folder / "run", OUTPUTS[output]
    stopped = train(flags(model, run), folder / "log", partial(broken, output, signum))
    code = 130 if signum == signal.SIGINT else 75
    assert (stopped.code, status(run)["state"], status(run)["exit_code"]) == (code, "stopped", code), stopped.err
    assert len(found_in(run)) == 1
    # The resumed run's output breaks as well, and it goes on to its end.
    resume = ["--resume_from_checkpoint", "auto", "--output_dir", str(run)]
    resumed = train(resume, folder / "log", partial(broken, output, 0))
    assert (resumed.code, status(run)["state"]) == (0, "done"), resumed.err
    assert same(result(run), result(straight))
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.__name__)
def test_a_run_whose_output_breaks_goes_on_and_at_a_signal_saves(output, straight, warm, tiny_folder, tmp_path, tried):
    warm(broken_and_stopped, tiny_folder, tmp_path, straight, output)
    tried("output that breaks", "went on to the same end bit by bit")
    tried("output that breaks, and a signal", "saved, with the signal's exit code")


# --- the run's own files -----------------------------------------------------------------------------------


def full_for_a_while(folder: Path) -> None:
    sys.stderr = io.StringIO()  # the limit would cut pytest's own files, too
    lines, row = JsonLines(folder), {"completion": "a"}

    def step(number: int) -> None:
        lines.log({"reward": 0.5}, step=number)
        lines.completions([row, row], step=number)

    step(1)
    no_file_over((folder / "metrics.jsonl").stat().st_size + 5, deadly=False)  # a write stops within a line
    step(2)
    step(3)
    no_file_over(resource.RLIM_INFINITY, deadly=False)
    step(4)
    no_file_over((folder / "metrics.jsonl").stat().st_size + 5, deadly=False)
    lines.log({"reward": 0.5}, step=5)
    no_file_over(resource.RLIM_INFINITY, deadly=False)
    lines.finish({})
    assert sys.stderr.getvalue().count("Warning: ") == 1


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.open()]


def test_metrics_wait_for_space_and_no_line_is_cut(tmp_path, tried):
    code, failure = fork(partial(full_for_a_while, tmp_path))
    assert code == 0, failure
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps_in(tmp_path / "completions.jsonl") == [1, 1, 4, 4]  # these are not kept in RAM
    tried("disk full or read-only", "metrics written when there was space")


def full_at_the_end(folder: Path) -> None:
    state = RunStatus(folder, max_steps=3)
    state.write("training", step=1)
    fail(folder, errno.ENOSPC, point=1)  # the space that the old one frees is enough
    state.write("stopped", exit_code=75)


def test_on_a_full_disk_the_status_is_still_true(tmp_path, tried):
    code, failure = fork(partial(full_at_the_end, tmp_path))
    assert code == 0, failure
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("stopped", 75)
    tried("disk full or read-only", "status written in the old one's place")
