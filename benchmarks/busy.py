"""A training step on a busy machine: alone, beside one and beside three busy processes.

OpenMP's threads meet at the end of every product, and how a thread waits there decides what a busy neighbour costs.
Compared are libgomp's own way (it looks for the others 300,000 times before it sleeps), ours (system/busy_machine.py)
and sleeping at once. Each has a separate process; they take the same step in turn, the others stopped. The last column
is the share of all cores that other programs used: rows with more than a few percent of it say nothing.

    python benchmarks/busy.py [--rounds 5] [--beside 0,1,3] [--generations 8] [--completion 24] [--json FILE]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

WAYS = {"libgomp's own": {}, "ours": {}, "asleep at once": {"OMP_WAIT_POLICY": "passive"}}
NEIGHBOUR = "while True: pass"


def main() -> None:
    arguments = parse_arguments()
    if arguments.way:
        return work(arguments)
    workers = {way: Worker(way) for way in WAYS}
    steps: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for beside in map(int, arguments.beside.split(",")):
            neighbours = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(beside)]
            for way, worker in workers.items():
                steps.setdefault((beside, way), []).append(taken := worker.step(neighbours))
                print(beside, way, json.dumps(taken), file=sys.stderr, flush=True)
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()
    for worker in workers.values():
        worker.process.kill()
    print_table(steps)
    if arguments.json:
        rows = [{"beside": beside, "way": way, "steps": taken} for (beside, way), taken in steps.items()]
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", default="0,1,3", help="numbers of busy processes, comma-separated")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--completion", type=int, default=24, help="tokens of each completion")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


class Worker:
    """A process that takes a step when asked, and is stopped otherwise."""

    def __init__(self, way: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        environment = {**os.environ, **WAYS[way], "PYTHONWARNINGS": "ignore"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen(command, **pipes)
        self._answer()
        self.step()  # the first step allocates

    def step(self, neighbours: Sequence[subprocess.Popen[Any]] = ()) -> dict[str, float]:
        """Return the seconds of a step by phase, and the share of all cores that other programs used meanwhile."""
        known = [psutil.Process(process.pid) for process in (self.process, *neighbours)]
        before = others_seconds(known)
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        taken = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return {**taken, "others": (others_seconds(known) - before) / taken["total"] / psutil.cpu_count()}

    def _answer(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a worker ended with {self.process.wait()}")


def others_seconds(known: Sequence[psutil.Process]) -> float:
    """Seconds of all cores, since the machine started, that were neither idle nor used by these processes."""
    machine = psutil.cpu_times()
    used = (
        sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
    )  # both are in user and nice
    return used - sum(sum(process.cpu_times()[:2]) for process in known)


def work(arguments: argparse.Namespace) -> None:
    from grpo_ds.system.busy_machine import watch_cores

    if arguments.way == "ours":
        watch_cores()
    from grpo_ds.report.console import Console
    from grpo_ds.settings.config import TrainConfig
    from grpo_ds.settings.ds_config import resolve_ds_config
    from grpo_ds.system import ranks
    from grpo_ds.system.hardware import native_precision
    from grpo_ds.task.questions import read_questions
    from grpo_ds.training.trainer import Trainer

    config = TrainConfig(
        model="smollm2-135m",
        batch_size=1,
        num_generations=arguments.generations,
        max_prompt_length=256,
        max_completion_length=arguments.completion,
    )
    ds = resolve_ds_config("ds_configs/zero2.json", fill=config.ds_sizes(native=native_precision(on_gpu=False)))
    rewards = {"length": (lambda completions, **_: [len(text) % 7 for text in completions], 1.0)}
    trainer = Trainer(config, ds, ranks.start(), Console(speaks=False), rewards)
    trainer.sampler.full_length = True  # every step has the same work
    questions = list(read_questions("sample").questions)[:1]
    trainer.make_reference(questions)
    print("{}", flush=True)
    for step, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        metrics = trainer.step(step, questions)
        phases = {phase: metrics[f"seconds/{phase}"] for phase in ("sample", "reference", "update", "step")}
        print(json.dumps({**phases, "total": time.perf_counter() - started}), flush=True)


def print_table(steps: dict[tuple[int, str], list[dict[str, float]]]) -> None:
    median = {key: statistics.median(step["total"] for step in taken) for key, taken in steps.items()}
    print("| beside | way | s a step (median) | range | x libgomp's own | x alone | others |\n" + "|---" * 7 + "|")
    for (beside, way), taken in steps.items():
        seconds = median[beside, way]
        totals = [step["total"] for step in taken]
        others = statistics.median(step["others"] for step in taken)
        alone = f"{seconds / median[0, way]:.2f}" if (0, way) in median else ""
        own = seconds / median[beside, next(iter(WAYS))]
        between = f"{min(totals):.1f} to {max(totals):.1f}"
        print(f"| {beside} | {way} | {seconds:.2f} | {between} | {own:.2f} | {alone} | {others:.0%} |")


if __name__ == "__main__":
    main()
