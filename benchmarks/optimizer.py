"""How fast a host steps its parameters: our 8-bit AdamW beside bitsandbytes', DeepSpeed's and torch's.

The contenders step the same gradient in turn, round after round, so that a busy neighbour slows them all; medians,
and the fastest step beside them (a neighbour slows a step that computes more than one that waits for memory).
`GB/s` is the least traffic a step can do with (bytes/param) over its time, to be held against the copy's.
`transient` is how far resident memory rose above its level before the step.

    python benchmarks/optimizer.py [--elements 67108864] [--rounds 7] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

OURS, OURS_SPLIT, OURS_STOCHASTIC = "CPUAdamW8bit", "same, bf16 + residual", "same, bf16 stochastic"
COPY, STAGING = "torch copy_", "ZeRO's staging copy"
BITSANDBYTES, DEEPSPEED, TORCH = "bitsandbytes AdamW8bit", "DeepSpeedCPUAdam", "torch AdamW(fused)"
# Gradient + parameter read and written + moments read and written. Ours reads the gradient twice: NaN check first.
BYTES = {
    OURS: 4 + 4 + 8 + 4,
    OURS_SPLIT: 2 + 2 + 8 + 4,
    OURS_STOCHASTIC: 2 + 2 + 4 + 4,
    BITSANDBYTES: 4 + 8 + 4,
    DEEPSPEED: 28,
    TORCH: 28,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One contender: medians over the rounds, at `elements` parameters."""

    name: str
    seconds: float
    parameters_per_second: float
    fastest_parameters_per_second: float
    bytes_per_parameter: int
    gigabytes_per_second: float
    transient_megabytes: float


def main() -> None:
    arguments = parse_arguments()
    # A user's `.venv/bin/python` finds the ninja of its own folder, which DeepSpeed's build asks for.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    steps = contenders(arguments.elements)
    transients = {name: transient_megabytes(step) for name, step in steps.items()}
    copies = copiers(arguments.elements)
    times: dict[str, list[float]] = {name: [] for name in [*steps, *copies]}
    for _ in range(arguments.rounds):
        for name, step in [*steps.items(), *copies.items()]:
            times[name].append(seconds(step))
    rows = [row(name, times[name], arguments.elements, transients[name]) for name in steps]
    medians = {name: statistics.median(times[name]) for name in copies}
    copy_bandwidth = 8 * arguments.elements / medians[COPY] / 1e9
    print_table(rows, copy_bandwidth, medians[STAGING], arguments)
    if arguments.json:
        report = {"machine": machine(), "elements": arguments.elements, "rounds": arguments.rounds}
        report |= {"copy_gigabytes_per_second": copy_bandwidth, "staging_copy_seconds": medians[STAGING]}
        report |= {"rows": [asdict(r) for r in rows]}
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 26, help="parameters in the flat tensor (default 64 Mi)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


def contenders(elements: int) -> dict[str, Callable[[], object]]:
    """Each with parameters and moments of its own, one step already taken."""
    import bitsandbytes
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from grpo_ds.optim import CPUAdamW8bit

    torch.manual_seed(0)
    gradient = torch.randn(elements) * torch.rand(elements) ** 3  # magnitudes spread over some decades

    def prepare(build, dtype=torch.float32):
        parameter = torch.nn.Parameter(torch.full((elements,), 0.02, dtype=dtype))
        parameter.grad = gradient.to(dtype)
        optimizer = build([parameter])
        optimizer.step()
        return optimizer.step

    settings = {"lr": 1e-5, "weight_decay": 0.01}
    return {
        OURS: prepare(lambda p: CPUAdamW8bit(p, **settings)),
        OURS_SPLIT: prepare(lambda p: CPUAdamW8bit(p, **settings, rounding="residual"), torch.bfloat16),
        OURS_STOCHASTIC: prepare(lambda p: CPUAdamW8bit(p, **settings, rounding="stochastic"), torch.bfloat16),
        BITSANDBYTES: prepare(lambda p: bitsandbytes.optim.AdamW8bit(p, **settings)),
        DEEPSPEED: prepare(lambda p: DeepSpeedCPUAdam(p, **settings)),
        TORCH: prepare(lambda p: torch.optim.AdamW(p, **settings, fused=True)),
    }


def copiers(elements: int) -> dict[str, Callable[[], object]]:
    """The machine's bandwidth, and what ZeRO does after each step of fp32 masters: their copy in bf16."""
    import torch

    source, target, half = torch.ones(elements), torch.zeros(elements), torch.zeros(elements, dtype=torch.bfloat16)
    return {COPY: lambda: target.copy_(source), STAGING: lambda: half.copy_(source)}


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def transient_megabytes(step: Callable[[], object]) -> float:
    """How far a step rises above what was resident before it."""
    from grpo_ds.memory.phases import host_memory, reset_host_peak

    reset_host_peak()
    _, before = host_memory()
    step()
    return max(0, host_memory()[0] - before) / 2**20


def row(name: str, times: list[float], elements: int, transient: float) -> Row:
    taken = statistics.median(times)
    moved = BYTES[name] * elements / taken / 1e9
    return Row(name, taken, elements / taken, elements / min(times), BYTES[name], moved, transient)


def machine() -> dict[str, object]:
    import torch

    from grpo_ds.optim import native

    path = "bitsandbytes slices" if native.library() is None else native.best_path()
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "path": path}


def print_table(rows: list[Row], copy_bandwidth: float, staging: float, arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    rate = {r.name: r.parameters_per_second for r in rows}
    table = Table(title=f"{arguments.elements / 1e6:.0f} M parameters, medians of {arguments.rounds} interleaved steps")
    for header in ("", "M param/s", "x bnb", "x DeepSpeed", "fastest", "bytes/param", "GB/s", "transient MB"):
        table.add_column(header, justify="right" if header else "left")
    for r in rows:
        ratios = [f"{r.parameters_per_second / rate[other]:.2f}" for other in (BITSANDBYTES, DEEPSPEED)]
        transient = f"{r.transient_megabytes:.0f}"
        speed, fastest = (f"{s / 1e6:.0f}" for s in (r.parameters_per_second, r.fastest_parameters_per_second))
        table.add_row(
            r.name, speed, *ratios, fastest, str(r.bytes_per_parameter), f"{r.gigabytes_per_second:.1f}", transient
        )
    table.add_row(COPY, "", "", "", "", "8", f"{copy_bandwidth:.1f}", "")
    elements = arguments.elements
    table.add_row(STAGING, f"{elements / staging / 1e6:.0f}", "", "", "", "6", f"{6e-9 * elements / staging:.1f}", "")
    Console(width=110).print(table)
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
