"""Signals in processes of their own: what children get, what nohup ignores, and what is said."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults("signals, in the run and in its children")

ROOT = Path(__file__).resolve().parents[2]

NOTED = """
import os, signal, sys, threading, time
from grpo_ds.system.signals import Interruption

interruption = Interruption()
with interruption.noted():
    exec(sys.stdin.read())
"""
# A child of a run ends at a signal, forked by the main thread or by another one.
CHILD = """
def forked():
    if child := os.fork():
        children.append(child)
    else:
        time.sleep(60)
        os._exit(0)
children = []
forked()
other = threading.Thread(target=forked)
other.start()
other.join()
time.sleep(0.1)
for child in children:
    os.kill(child, signal.{0})
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(interruption.signum)
"""


def noted(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", NOTED], input=code, cwd=ROOT, capture_output=True, text=True, timeout=30, **options
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_forked_child_ends_at_once_by_the_signal_that_its_run_would_note(name):
    ended = noted(CHILD.format(name))
    died = str(-getattr(signal, name))
    assert ended.stdout.split() == [died, died, "0"], ended.stderr


def test_a_forked_child_gets_ctrl_c_as_an_exception():
    ended = noted(CHILD.format("SIGINT"))
    assert ended.stdout.split()[-1] == "0"
    assert ended.stderr.count("KeyboardInterrupt") == 2


def test_a_pool_of_processes_can_be_terminated():
    code = (
        "import multiprocessing\nchild = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "child.start(); child.terminate(); child.join(); print(child.exitcode)"
    )
    assert noted(code).stdout == f"{-signal.SIGTERM}\n"


def test_sighup_is_noted_and_under_nohup_ignored():
    code = "os.kill(os.getpid(), signal.SIGHUP); print(interruption.signum); time.sleep(0.2)"
    ended = noted(code)
    assert (ended.stdout, ended.stderr) == (f"{int(signal.SIGHUP)}\n", "SIGHUP: saving at the next safe point.\n")
    ended = noted(code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (ended.stdout, ended.stderr) == ("0\n", "")


def test_a_signal_is_noted_and_a_second_one_obeyed_if_nothing_can_be_said():
    """stderr is a pipe that nobody reads and that is full: a handler that wrote to it would never return."""
    code = (
        "os.set_blocking(2, False)\n"
        "try:\n    while True: os.write(2, bytes(4096))\nexcept BlockingIOError: os.set_blocking(2, True)\n"
        "os.kill(os.getpid(), signal.SIGINT); print(interruption.signum)\ntime.sleep(1.1)\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: print('again', flush=True); os._exit(0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", NOTED], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(code.encode())
    process.stdin.close()
    try:
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() == 0
        assert process.stdout.read().split() == [b"2", b"again"]
    finally:
        process.kill()


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full"])
def test_before_there_is_something_to_save_a_signal_ends_with_its_code_if_nothing_can_be_said(stream):
    code = (
        "import os, signal\nfrom grpo_ds.system.signals import exit_on_signal\n"
        "with exit_on_signal(): os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert subprocess.run(["bash", "-c", f'"$0" -c "$1" {stream}', sys.executable, code], cwd=ROOT).returncode == 75
