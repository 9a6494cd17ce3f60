"""The stages of card.py and their parts, the most telling first; estimates are upper ones, for a card and 16 cores."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from card_parts import ROOT, Part
from card_run import COMBINATIONS
from fit import RUNS_ON_A_CARD

WEIGHTS = ROOT / "build" / "card-weights"  # random weights that the parts of a stage share
KEPT = ("--weights", str(WEIGHTS))
TRL = ("trl", "datasets", "pyarrow", "pandas")  # with what it imports
COMPILING = 60  # seconds of the first run: our optimizer and DeepSpeed's


@dataclass(frozen=True, slots=True)
class Stage:
    title: str
    parts: tuple[Part, ...]


def whole_runs() -> Iterator[Part]:
    for number, name in enumerate(COMBINATIONS):
        yield Part(name, 70 + (0 if number else COMPILING), ("benchmarks/card_run.py", name))


CHECKS = {  # a test of tests/test_gpu.py -> seconds
    "test_no_attention_of_a_packed_row_takes_the_math_kernel": 40,
    "test_the_same_gradient_twice_has_the_same_bits": 40,
    "test_bf16_logprobs_on_the_tensor_cores_equal_float64": 30,
    "test_cuda_graphs_sample_what_single_kernels_do": 60,
    "test_a_run_on_a_full_card_ends_with_its_message": 90,
    "test_a_run_on_a_full_card_continues_with_oom_retry": 90,
}


def checks() -> Iterator[Part]:
    quiet = ("-q", "-s", "-p", "no:cacheprovider", "--no-header", "--tb=short")
    for name, seconds in CHECKS.items():
        title = name.removeprefix("test_").replace("_", " ")
        yield Part(title, seconds, ("-m", "pytest", *quiet, f"tests/test_gpu.py::{name}"), needs=("pytest",))


def fits() -> Iterator[Part]:
    for name, flags in RUNS_ON_A_CARD.items():
        yield Part(name, 120 if name.startswith("3B") else 80, ("benchmarks/fit.py", *flags, *KEPT))


def decodes() -> Iterator[Part]:
    for model, seconds in {"qwen2.5-1.5b": 120, "qwen2.5-3b": 170}.items():
        for groups in ("2x4", "4x8"):
            questions, generations = groups.split("x")
            sizes = ("--questions", questions, "--generations", generations)
            command = ("benchmarks/card_decode.py", "--model", model, *sizes, *KEPT)
            yield Part(f"{model}, {groups} rows", seconds, command)


def logprobs() -> Iterator[Part]:
    for tokens, seconds in {1200: 90, 4800: 120, 300: 90}.items():
        words = ("benchmarks/logprobs.py", "--device", "cuda", "--tokens", str(tokens), "--json", "{json}")
        yield Part(f"{tokens} tokens", seconds, words)


def steps() -> Iterator[Part]:
    sizes = ("--dtype", "bfloat16", "--questions", "2", "--completion", "300", "--json", "{json}")
    for model, seconds in {"qwen2.5-0.5b": 240, "qwen2.5-1.5b": 420}.items():
        yield Part(f"{model} beside TRL", seconds, ("benchmarks/step.py", "--preset", model, *sizes, *KEPT), TRL)


STAGES = {
    1: Stage("whole runs of a tiny model", tuple(whole_runs())),
    2: Stage("kernels, determinism, full memory", tuple(checks())),
    3: Stage("memory under caps", tuple(fits())),
    4: Stage("decoding", tuple(decodes())),
    5: Stage("log-probs", tuple(logprobs())),
    6: Stage("a step beside TRL's", tuple(steps())),
}


@contextmanager
def without_weights() -> Iterator[None]:
    """Remove the shared random weights in the end. After a kill they stay, and the next call uses them."""
    try:
        yield
    finally:
        shutil.rmtree(WEIGHTS, ignore_errors=True)
