"""Cost of log-probs through the head: our chunked version, TRL's, Liger's and the full logits.

Each method computes log-probs from hidden states [N, H], head [V, H] and targets, and both gradients. `peak` is the
memory above the inputs, gradients included: on a card the allocator's peak; on a CPU the growth of resident memory in a
separate process, with a malloc that returns freed memory. `seconds` are medians of rounds in which the methods take
turns, so that other load on the machine slows all of them. `error` is the largest difference of a log-prob from
float64, over the first 300 tokens.

    python benchmarks/logprobs.py [--device cuda] [--dtype bfloat16] [--tokens 300 1200 4800] [--quick] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

OURS, TRL, LIGER = "ours", "TRL, chunked", "Liger GRPO loss"
NAIVE, TRL_FULL = "full logits, log_softmax + gather", "full logits, TRL selective_log_softmax"
COMPLETION = 300  # tokens; Liger needs sequences and computes them one at a time
CHECKED = 300  # tokens whose log-probs are compared with float64
TRL_CHUNK = 32768  # the value in TRL's trainers
# glibc keeps freed blocks below a threshold that rises over time; with a fixed one it returns larger blocks.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One method at one number of tokens; None if it was not measured or cannot run (`note` has the reason)."""

    name: str
    tokens: int
    peak_megabytes: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def seconds(self) -> float | None:
        return None if self.forward_seconds is None else self.forward_seconds + (self.backward_seconds or 0.0)


def main() -> None:
    arguments = parse_arguments()
    if arguments.one_peak:
        print(json.dumps(resident_peak(arguments.one_peak, arguments)))
        return
    rows: list[Measurement] = []
    for tokens in arguments.tokens:
        rows += measure(tokens, arguments)
        print_table(rows[-len(arguments.sides) :], tokens, arguments)
        if arguments.json:
            options = {key: value for key, value in vars(arguments).items() if key not in ("json", "one_peak")}
            report = {"machine": machine(arguments.device), "options": options, "rows": [asdict(r) for r in rows]}
            Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    print(", ".join(f"{key}: {value}" for key, value in machine(arguments.device).items()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of hidden states and head"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[300, 1200, 4800])
    parser.add_argument("--vocab", type=int, default=151_936, help="default: Qwen2.5's")
    parser.add_argument("--hidden", type=int, default=2048, help="default: Qwen2.5-3B's")
    parser.add_argument("--chunk_mib", type=float, default=64.0, help="chunk of our method (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each method; 0: no times")
    parser.add_argument(
        "--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="SIDE", help=str([*SIDES])
    )
    parser.add_argument(
        "--quick", action="store_true", help="300 tokens, a head of 8,192 x 256, two rounds: a minute on a CPU"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--one_peak", metavar="SIDE", help=argparse.SUPPRESS)  # run in a separate process
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.vocab, arguments.hidden, arguments.tokens, arguments.rounds = 8192, 256, [300], 2
    return arguments


def naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Convert to fp32 after the matmul, like models that upcast their logits."""
    return (hidden @ head.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def trl_full(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden @ head.T, targets)


def trl_chunked(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("log_probs",))[0]


def liger(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Liger's log-probs; `liger_loss` is timed instead, as it computes both gradients in its forward."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], head, targets[None])[0]


def liger_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    length = COMPLETION if len(targets) % COMPLETION == 0 else len(targets)
    ids = targets.view(-1, length)
    advantages = torch.linspace(-1, 1, len(ids), device=ids.device)
    # Without a reference, and without torch.compile, which would compile only the [B, T] part.
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
    return loss(hidden.view(*ids.shape, -1), head, ids, torch.ones_like(ids), advantages)[0]


def ours(chunk_mib: float) -> Logprobs:
    from grpo_ds.core.logprobs import token_logprobs

    return lambda hidden, head, targets: token_logprobs(
        hidden, head, targets, vocab_size=len(head), chunk_mib=chunk_mib
    )


SIDES: dict[str, Callable[[float], Logprobs]] = {
    NAIVE: lambda _: naive,
    TRL_FULL: lambda _: trl_full,
    TRL: lambda _: trl_chunked,
    LIGER: lambda _: liger,
    OURS: ours,
}


def loss_of(name: str, chunk_mib: float) -> Logprobs:
    """Return a function (hidden, head, targets) -> scalar, whose gradients are computed."""
    if name == LIGER:
        return liger_loss
    logprobs = SIDES[name](chunk_mib)
    return lambda *tensors: (
        logprobs(*tensors).float() @ torch.linspace(-1, 1, len(tensors[2]), device=tensors[2].device)
    )


def inputs(tokens: int, vocab: int, hidden: int, arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Make inputs whose logits have a standard deviation of 3 and reach 15, as a model's do."""
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    states = torch.randn(tokens, hidden, **options).requires_grad_()
    head = torch.randn(vocab, hidden, **options).mul_(3 / hidden**0.5).requires_grad_()
    return states, head, torch.randint(0, vocab, (tokens,), device=arguments.device)


def measure(tokens: int, arguments: argparse.Namespace) -> list[Measurement]:
    tensors = inputs(tokens, arguments.vocab, arguments.hidden, arguments)
    exact = float64_logprobs(*(t.detach() for t in tensors))
    losses, failed, times = {}, {}, {}
    for name in arguments.sides:
        try:  # at a small size; this also loads libraries and compiles kernels
            step(loss_of(name, arguments.chunk_mib), inputs(COMPLETION, 1000, 64, arguments))
            losses[name] = loss_of(name, arguments.chunk_mib)
            times[name] = []
        except (ImportError, RuntimeError) as error:  # no Triton, no kernel for this device
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    peaks = {name: peak(name, tokens, losses[name], tensors, arguments) for name in losses}
    for _ in range(arguments.rounds):
        for name, loss in losses.items():
            times[name].append(step(loss, tensors))
    rows = []
    for name in arguments.sides:
        if name in failed:
            rows.append(Measurement(name, tokens, note=failed[name]))
            continue
        forward, backward = map(statistics.median, zip(*times[name], strict=True)) if times[name] else (None, None)
        rows.append(
            Measurement(name, tokens, peaks[name], forward, backward, error_of(name, tensors, exact, arguments))
        )
    return rows


def step(loss: Logprobs, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Return the seconds of forward and backward; the gradients are dropped."""
    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    value = loss(*tensors)
    wait()
    middle = time.perf_counter()
    gradients = torch.autograd.grad(value, tensors[:2])
    wait()
    assert all(g.dtype == t.dtype for g, t in zip(gradients, tensors, strict=False))
    return middle - start, time.perf_counter() - middle


def peak(name: str, tokens: int, loss: Logprobs, tensors, arguments: argparse.Namespace) -> float | None:
    """Return the peak of one step above its inputs, in MB."""
    if arguments.device == "cpu":
        same = [f"--{key}={getattr(arguments, key)}" for key in ("device", "dtype", "vocab", "hidden", "chunk_mib")]
        command = [sys.executable, __file__, *same, f"--tokens={tokens}", f"--one_peak={name}"]
        result = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])
    step(loss, tensors)  # cuBLAS allocates its workspace once and keeps it
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, tensors)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident_peak(name: str, arguments: argparse.Namespace) -> float:
    """Return the growth of resident memory in one step, in MB; called in a separate process."""
    from grpo_ds.memory.phases import reset_resident_peak, resident_memory

    loss = loss_of(name, arguments.chunk_mib)
    tensors = inputs(arguments.tokens[0], arguments.vocab, arguments.hidden, arguments)
    step(loss, inputs(COMPLETION, 1000, 64, arguments))  # loads code and thread pools
    reset_resident_peak()
    _, before = resident_memory()
    step(loss, tensors)
    return max(0, resident_memory()[0] - before) / 1e6


def float64_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    hidden, targets = hidden[:CHECKED].double(), targets[:CHECKED]
    blocks = [(hidden @ rows.double().T).logsumexp(1) for rows in head.split(4096)]
    return (hidden * head[targets].double()).sum(1) - torch.stack(blocks).logsumexp(0)


@torch.no_grad()
def error_of(name: str, tensors, exact: Tensor, arguments: argparse.Namespace) -> float:
    hidden, head, targets = tensors
    logprobs = SIDES[name](arguments.chunk_mib)(hidden[:CHECKED], head, targets[:CHECKED])
    return (logprobs.double() - exact).abs().max().item()


def machine(device: str) -> dict[str, object]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = {package: installed(package) for package in ("torch", "trl", "liger_kernel")}
    return {"device": name, "threads": torch.get_num_threads(), **packages}


def print_table(rows: list[Measurement], tokens: int, arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    by_name = {r.name: r for r in rows}
    shape = f"{tokens} tokens, {arguments.vocab} x {arguments.hidden} head, {arguments.dtype}"
    table = Table(title=f"{shape}, {arguments.rounds} interleaved rounds")
    for header in ("", "peak MB", "x TRL", "x naive", "forward s", "backward s", "x TRL", "x naive", "error"):
        table.add_column(header, justify="right" if header else "left")

    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def ratio(row: Measurement, other: str, field: str) -> str:
        mine, theirs = getattr(row, field), getattr(by_name.get(other), field, None)
        return f"{mine / theirs:.2f}" if mine and theirs else ""

    for r in rows:
        memory = [show(r.peak_megabytes, ".0f"), *(ratio(r, other, "peak_megabytes") for other in (TRL, NAIVE))]
        taken = [show(r.forward_seconds, ".3g"), show(r.backward_seconds, ".3g")]
        taken += [ratio(r, other, "seconds") for other in (TRL, NAIVE)]
        table.add_row(r.name, *memory, *taken, show(r.error, ".1e"))
    Console(width=130).print(table)
    for r in rows:
        if r.note:
            print(f"{r.name} cannot run here: {r.note}")


if __name__ == "__main__":
    main()
