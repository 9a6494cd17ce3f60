"""docs/deploy.md: its Python and the command that writes the Modelfile run on a run's folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds.report.snippets import messages_of, modelfile
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "outputs" / "RUN"
    folder.mkdir(parents=True)
    write_config(TrainConfig(few_shot=2, prefill=True, subject="biomedical"), folder)
    return folder


def python(code, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_messages_are_those_of_training(run):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    printed = json.loads(python(code, run.parents[1]))
    assert printed == messages_of(run, "Does aspirin reduce fever?", "In a trial of 200 ...") and len(printed) == 7


def test_the_command_writes_the_modelfile(run):
    (code,) = re.findall(r"^python -c '(.*?)' > Modelfile$", PAGE, re.M)
    assert python(code, run.parents[1]) == f"{modelfile(run)}\n"
