"""Fixtures: the tiny model of tiny.py, and a process that begins as a new one does."""

import doctest
import importlib.util
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  jaxtyping finds the checker by its path
from tests.tiny import CHATML, make_tokenizer, save_formed, save_tiny, tiny_config

# Shapes in signatures are checked in tests only.
install_import_hook(["grpo_ds.core", "grpo_ds.models.quantized"], "tests.shapes.check")

# A template that prints the date, as Llama 3's, SmolLM3's and gpt-oss's do.
DATED = "Today is {{ strftime_now('%d %B %Y, %H:%M') }}.\n" + CHATML
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "pubmedqa"


@pytest.fixture(autouse=True)
def signals_of_a_new_process():
    """A command that has ended ignores signals, and `nohup` or a script's `&` start programs that do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Skip tests marked peer("trl") where that package is not installed."""
    for item in items:
        for mark in item.iter_markers("peer"):
            if importlib.util.find_spec(mark.args[0]) is None:
                item.add_marker(pytest.mark.skip(reason=f"{mark.args[0]} is not installed: make test-peers"))


class Clock(datetime):
    """The clock that chat templates read in a test with `days_pass`: a day passes whenever one reads it."""

    day = datetime(2026, 2, 27, 23, 59)

    @classmethod
    def now(cls, tz=None):
        cls.day += timedelta(days=1)
        return cls.day


@pytest.fixture
def days_pass(monkeypatch):
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", Clock.day)


def load_unchecked(module):
    """Load a second copy of a module in which no argument is checked against its annotation, as outside of tests."""
    spec = importlib.util.spec_from_file_location(f"unchecked_{module.__name__.rpartition('.')[2]}", module.__file__)
    unchecked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unchecked)
    return unchecked


def check_example(cls):
    """Run the `Example:` in the docstring of a class; it must be there, and its values must be right."""
    (test,) = doctest.DocTestFinder(recurse=False).find(cls, globs=dict(vars(sys.modules[cls.__module__])))
    assert test.examples, f"{cls.__name__} has no example"
    assert doctest.DocTestRunner().run(test).failed == 0, f"the example of {cls.__name__} is wrong (see the output)"


@pytest.fixture(autouse=True)
def no_rendezvous_left_behind():
    """Remove the rendezvous address that a trainer set here: processes of a later test must not use it."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """Let DeepSpeed train in fp16 here: it refuses CPUs without AVX512-FP16, though torch computes it, slowly."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_model():
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny model and its tokenizer as an ordinary transformers folder."""
    return save_tiny(tmp_path_factory.mktemp("tiny_qwen2"))


@pytest.fixture(scope="session")
def formed_folder(tiny_folder, tmp_path_factory):
    """The tiny model, taught to write completions in form with the flags of tests.tiny.FORM."""
    return save_formed(tmp_path_factory.mktemp("formed_qwen2"), tiny_folder)


# --- faults, counted: `make test-faults` prints them as a table at its end -------------------------------

COUNTS: dict[str, Counter[str]] = defaultdict(Counter)


@pytest.fixture(scope="session")
def tried() -> Callable[[str, str], None]:
    """Count a fault after its assertions: tried("kill -9 while saving", "survived")."""

    def count(kind: str, outcome: str) -> None:
        COUNTS[kind][outcome] += 1

    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Count a test that passed under a module's `pytestmark = pytest.mark.faults("kind of fault")`."""
    report = yield
    for mark in item.iter_markers("faults"):
        if mark.args and call.when == "call" and report.passed:
            COUNTS[mark.args[0]]["ended as promised"] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (worker := getattr(session.config, "workeroutput", None)) is not None:  # one of several worker processes
        worker["tried"] = {kind: dict(outcomes) for kind, outcomes in COUNTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for kind, outcomes in getattr(node, "workeroutput", {}).get("tried", {}).items():
        COUNTS[kind].update(outcomes)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not COUNTS:
        return
    width = max(map(len, COUNTS))
    terminalreporter.section("faults tried")
    for kind, outcomes in COUNTS.items():
        parts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        terminalreporter.line(f"{kind:<{width}}  {sum(outcomes.values()):>4}: {parts}")
