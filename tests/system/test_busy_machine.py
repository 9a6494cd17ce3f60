"""Threads that wait sleep soon while the machine is busy, and as libgomp says while it is not."""

import os
import subprocess
import sys
import threading

import pytest

from grpo_ds.system import busy_machine
from grpo_ds.system.busy_machine import SETTINGS, seconds_waited, watch_cores

SHARES = [0.0, 0.9, 0.2, 0.05, 0.3]  # of an interval, and what they make of it:
ACTS = ["made", "ended", "made"]


def test_threads_sleep_soon_from_the_first_busy_interval_to_the_first_free_one(monkeypatch):
    acts = []

    class Team:
        def __init__(self):
            acts.append("made")

        def end(self):
            acts.append("ended")

    monkeypatch.setitem(sys.modules, "torch", sys)  # a run has loaded it
    monkeypatch.setattr(busy_machine, "SleepyThreads", Team)
    monkeypatch.setattr(busy_machine, "_busy_intervals", lambda: iter(SHARES))
    busy_machine._watch()
    assert acts == ACTS


def test_what_linux_counted_of_all_threads(tmp_path):
    for thread, text in {"1": "5 2000000000 7", "2": "5 500000000 7", "3": "", "4": None}.items():
        (tmp_path / thread).mkdir()
        if text is not None:
            (tmp_path / thread / "schedstat").write_text(text)
    assert seconds_waited(tmp_path) == 2.5


SLEEPS = """
import os, resource, torch
from grpo_ds.system.busy_machine import SleepyThreads

torch.set_num_threads(len(os.sched_getaffinity(0)))
one, other = torch.randn(64, 576), torch.randn(576, 576)

def products():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw  # how often this process went to sleep by itself
    results = [one @ other for _ in range(300)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before, results[-1]

products()
as_libgomp_says, expected = products()
sleepy = SleepyThreads()
while_busy, result = products()
sleepy.end()
assert torch.equal(result, expected)
print(as_libgomp_says, while_busy)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core no thread waits for another")
def test_sleepy_threads_sleep_and_compute_the_same():
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", SLEEPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    as_libgomp_says, while_busy = map(int, done.stdout.split())
    assert while_busy > 200 + 3 * as_libgomp_says  # 1,197 and 0 on two cores, alone or beside two busy processes


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_user_who_says_how_threads_wait_has_chosen(name, monkeypatch):
    for other in SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    before = threading.active_count()
    watch_cores()
    assert threading.active_count() == before
