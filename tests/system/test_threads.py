"""Threads: a process that has the machine uses all of its cores; ranks share them; the user's own number stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds.system import script

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
from grpo_ds.system.script import run_script

def main(argv):
    import torch
    print("threads", torch.get_num_threads())

run_script(main)
"""
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def threads_of(file, *launcher, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment.update({"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables})
    words = [sys.executable, *launcher, str(file)]
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    return int(shown.split("threads ")[1].split()[0])


def test_under_accelerate_one_process_uses_as_many_threads_as_without_it(tmp_path):
    file = tmp_path / "show.py"
    file.write_text(SHOW)
    alone = threads_of(file)
    assert threads_of(file, *ACCELERATE) == alone
    assert threads_of(file, OMP_NUM_THREADS="1") == 1


A, T, S = script.BY_ACCELERATE, script.BY_TORCHRUN, "LOCAL_WORLD_SIZE"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [  # on 8 cores; None: not set, torch takes all
        ({}, None),
        ({"OMP_NUM_THREADS": "1"}, "1"),  # the user's
        ({"OMP_NUM_THREADS": "1", A: "no"}, None),  # accelerate's
        ({"OMP_NUM_THREADS": "3", A: "no"}, "3"),  # accelerate passes the user's on
        ({"OMP_NUM_THREADS": "1", T: "none", S: "1"}, "1"),  # torchrun writes none for one process: the user's
        ({"OMP_NUM_THREADS": "1", T: "none", S: "2"}, "4"),
        ({"LOCAL_SIZE": "3", "WORLD_SIZE": "6"}, "2"),  # deepspeed writes none
        ({"LOCAL_SIZE": "16"}, "1"),  # never none at all
        ({"WORLD_SIZE": "16"}, None),  # nobody says how many of them are here
    ],
)
def test_ranks_share_the_cores_and_a_users_number_stays(variables, expected, monkeypatch):
    monkeypatch.setattr(script, "_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", A, T, S, "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    script.divide_cores()
    assert os.environ.get("OMP_NUM_THREADS") == expected
