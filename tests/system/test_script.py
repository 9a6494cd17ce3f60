"""How a command runs: threads that wait for a busy core sleep soon."""

import os
import subprocess
import sys

import pytest

LOAD_TORCH = "from grpo_ds.system.script import run_script; run_script(lambda argv: __import__('torch'))"


@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, 3000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)],
)
def test_torchs_threads_wait_as_we_say_unless_the_user_does(environment, spins):
    asked = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    asked |= {"OMP_DISPLAY_ENV": "verbose", **environment}  # libgomp prints what it has read, when it is loaded
    done = subprocess.run([sys.executable, "-c", LOAD_TORCH], env=asked, capture_output=True, text=True, timeout=120)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
