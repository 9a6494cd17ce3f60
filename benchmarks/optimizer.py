"""Speed of optimizer steps on a CPU: our 8-bit AdamW, bitsandbytes', DeepSpeed's and torch's.

The optimizers step the same gradient in turn, round after round, so that other load on the machine slows all of them.
Reported are medians and the fastest step (other load slows a step that computes more than one that waits for memory).
`GB/s` is the least memory traffic of a step (bytes/param) divided by its time, to be compared with the copy's.
`transient` is the growth of resident memory above its level before the step.

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
COMPANDED, COMPANDED_SPLIT, COMPANDED_8 = "companded moments", "same, bf16 + residual ", "same, bf16 + 8 bits"
SGD_SPLIT = "CPUSGD, bf16 + residual"
COPY, STAGING = "torch copy_", "ZeRO's staging copy"
BITSANDBYTES, DEEPSPEED, TORCH = "bitsandbytes AdamW8bit", "DeepSpeedCPUAdam", "torch AdamW(fused)"
# Gradient + parameter read and written + moments read and written. Ours reads the gradient twice: first to find NaN.
BYTES = {
    OURS: 4 + 4 + 8 + 4,
    OURS_SPLIT: 2 + 2 + 8 + 4,
    OURS_STOCHASTIC: 2 + 2 + 4 + 4,
    COMPANDED: 4 + 4 + 8 + 4,
    COMPANDED_SPLIT: 2 + 2 + 8 + 4,
    COMPANDED_8: 2 + 2 + 6 + 4,
    SGD_SPLIT: 2 + 2 + 8,
    BITSANDBYTES: 4 + 8 + 4,
    DEEPSPEED: 28,
    TORCH: 28,
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One optimizer: medians over the rounds, at `elements` parameters."""

    name: str
    seconds: float
    parameters_per_second: float
    fastest_parameters_per_second: float
    bytes_per_parameter: int
    gigabytes_per_second: float
    transient_megabytes: float


def main() -> None:
    arguments = parse_arguments()
    # DeepSpeed's build needs ninja, which is in the folder of this Python and perhaps not in PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    steps = optimizer_steps(arguments.elements)
    transients = {name: transient_megabytes(step) for name, step in steps.items()}
    copies = copiers(arguments.elements)
    times: dict[str, list[float]] = {name: [] for name in [*steps, *copies]}
    for _ in range(arguments.rounds):
        for name, step in [*steps.items(), *copies.items()]:
            times[name].append(seconds(step))
    rows = [measurement(name, times[name], arguments.elements, transients[name]) for name in steps]
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
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each optimizer (default 7)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args()


def optimizer_steps(elements: int) -> dict[str, Callable[[], object]]:
    """Make the optimizers, each with its own parameters and moments after one step."""
    import bitsandbytes
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from grpo_ds.optim import CPUSGD, CPUAdamW8bit

    torch.manual_seed(0)
    gradient = torch.randn(elements) * torch.rand(elements) ** 3  # magnitudes over several decades

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
        COMPANDED: prepare(lambda p: CPUAdamW8bit(p, **settings, moments="companded")),
        COMPANDED_SPLIT: prepare(
            lambda p: CPUAdamW8bit(p, **settings, moments="companded", rounding="residual"), torch.bfloat16
        ),
        COMPANDED_8: prepare(
            lambda p: CPUAdamW8bit(p, **settings, moments="companded", rounding="residual8"), torch.bfloat16
        ),
        SGD_SPLIT: prepare(lambda p: CPUSGD(p, **settings, rounding="residual"), torch.bfloat16),
        BITSANDBYTES: prepare(lambda p: bitsandbytes.optim.AdamW8bit(p, **settings)),
        DEEPSPEED: prepare(lambda p: DeepSpeedCPUAdam(p, **settings)),
        TORCH: prepare(lambda p: torch.optim.AdamW(p, **settings, fused=True)),
    }


def copiers(elements: int) -> dict[str, Callable[[], object]]:
    """Make the copies: one measures the bandwidth, the other is ZeRO's copy of fp32 masters to bf16 after each step."""
    import torch

    source, target, half = torch.ones(elements), torch.zeros(elements), torch.zeros(elements, dtype=torch.bfloat16)
    return {COPY: lambda: target.copy_(source), STAGING: lambda: half.copy_(source)}


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def transient_megabytes(step: Callable[[], object]) -> float:
    """Return the growth of resident memory in a step."""
    from grpo_ds.memory.phases import reset_resident_peak, resident_memory

    reset_resident_peak()
    _, before = resident_memory()
    step()
    return max(0, resident_memory()[0] - before) / 2**20


def measurement(name: str, times: list[float], elements: int, transient: float) -> Measurement:
    taken = statistics.median(times)
    moved = BYTES[name] * elements / taken / 1e9
    return Measurement(name, taken, elements / taken, elements / min(times), BYTES[name], moved, transient)


def machine() -> dict[str, object]:
    import torch

    from grpo_ds.optim import native

    path = "bitsandbytes slices" if native.library() is None else native.best_path()
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "path": path}


def print_table(rows: list[Measurement], copy_bandwidth: float, staging: float, arguments: argparse.Namespace) -> None:
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
