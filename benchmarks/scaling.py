"""Time of a step by group size, prompt, completion and model, with a lower bound from arithmetic.

One size at a time differs from the middle shape; each shape has a separate process (benchmarks/step.py's side
"ours"). The bound is the necessary work at the speed of a large matrix product on this machine; for decoding, if
that is slower, reading the weights once per token at the speed of a copy. The last column has the tokens of a trainer
that repeats the prompt for every completion.

    python benchmarks/scaling.py [--steps 1] [--model smollm2-135m] [--dtype float32] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step import answer


@dataclass(frozen=True)
class Shape:
    """Sizes of a step with one question."""

    model: str
    prompt: int = 384
    generations: int = 8
    completion: int = 64

    @property
    def packed(self) -> int:
        """Tokens computed once for the group."""
        return self.prompt + self.generations * (self.completion - 1)

    @property
    def repeated(self) -> int:
        """Tokens of a trainer that repeats the prompt for every completion."""
        return self.generations * (self.prompt + self.completion)


VARIED = {"generations": (2, 4, 16, 32), "prompt": (96, 192, 768), "completion": (16, 32, 128)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1, help="measured steps of each shape")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--larger", nargs="*", default=[], help="other models, measured at the middle shape")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    middle = Shape(arguments.model)
    shapes = [middle, *(replace(middle, **{name: size}) for name, sizes in VARIED.items() for size in sizes)]
    shapes += [replace(middle, model=model) for model in arguments.larger]
    flops, bandwidth = machine(arguments.dtype)
    print(f"{flops / 1e9:.0f} GFLOP/s in a product of 1,024, {bandwidth / 1e9:.1f} GB/s in a copy", file=sys.stderr)
    rows = []
    for shape in shapes:
        rows.append((shape, measured(shape, arguments), lower_bound(shape, arguments.dtype, flops, bandwidth)))
        print(*rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([[vars(s), m, f] for s, m, f in rows], indent=1) + "\n")


def machine(dtype: str) -> tuple[float, float]:
    """Measure FLOP/s of a large matrix product and bytes/s of a copy (read and written), the best of several."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(run: Any) -> float:
        taken = []
        for _ in range(7):
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return min(taken)

    size = 1024 if device == "cpu" else 8192
    square, long = (
        torch.randn(size, size, dtype=getattr(torch, dtype), device=device),
        torch.empty(2**27, device=device),
    )
    other = torch.empty_like(long)
    return 2 * size**3 / seconds(lambda: square @ square), 2 * 4 * 2**27 / seconds(lambda: other.copy_(long))


def measured(shape: Shape, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each phase, and the peak."""
    script = str(Path(__file__).with_name("step.py"))
    flags = [f"--{name}={value}" for name, value in vars(shape).items()]
    command = [sys.executable, script, *flags, "--dtype", arguments.dtype, "--side", "ours"]
    worker: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answer(worker)  # ready
    taken = []
    for _ in range(arguments.steps + 1):  # the first step allocates
        worker.stdin.write("go\n")
        worker.stdin.flush()
        taken.append(answer(worker))
    worker.kill()
    return {name: statistics.median(step[name] for step in taken[1:]) for name in taken[0]}


def lower_bound(shape: Shape, dtype: str, flops: float, bandwidth: float) -> dict[str, float]:
    """Return the seconds of each phase for only its matrix products (for decoding: reading the weights)."""
    from grpo_ds.models.shapes import shape_of

    model = shape_of(shape.model)
    head = model.vocab * model.hidden
    body = model.parameters - head * (1 if model.tied else 2)
    targets, attention = shape.generations * shape.completion, 4 * model.layers * model.heads * model.head_dim
    seen = shape.prompt**2 / 2 + shape.generations * shape.completion * (shape.prompt + shape.completion / 2)
    forward = 2 * body * shape.packed + attention * seen
    decode = shape.completion * max(
        2 * (body + head) * shape.generations / flops, (body + head) * (4 if dtype == "float32" else 2) / bandwidth
    )
    return {
        "sample": (2 * body * shape.prompt) / flops + decode,
        "reference": (forward + 2 * head * targets) / flops,
        "update": (3 * forward + 4 * 2 * head * targets) / flops,  # the head's logits are computed twice
    }


def print_table(rows: list[tuple[Shape, dict[str, float], dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="seconds: measured / lower bound")
    headers = (
        "model",
        "P",
        "G",
        "C",
        "tokens",
        "sample",
        "reference",
        "update",
        "total",
        "peak RAM, GiB",
        "G (P + C) tokens",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "model" else "right")
    for shape, took, least in rows:
        phases = [f"{took[phase]:.1f} / {least[phase]:.1f}" for phase in ("sample", "reference", "update")]
        sizes = (shape.prompt, shape.generations, shape.completion, shape.packed)
        table.add_row(
            Path(shape.model).name,
            *map(str, sizes),
            *phases,
            f"{took['total']:.1f}",
            f"{took['ram_gib']:.2f}",
            f"{shape.repeated} ({shape.repeated / shape.packed:.1f} x)",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
