"""`make card-sim`: planned beside simulated GPU memory for every run of rows.py, whole models.

    python -m tests.card.table [--docs docs/memory.md] [--of README]

Prints a line for each run and ends with 1 if a plan is off by more than the bounds. --docs: write the table between
the file's card-sim markers. --of: only these rows.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from grpo_ds.memory.plan import GIB
from grpo_ds.memory.select import Job, reserved
from tests.card.rows import ROOT, Row, rows, sizes

MOST_UNDER, MOST_OVER = 0.02, 0.05  # of what was simulated
PHASES = ("initialise", "evaluate", "sample", "reference", "update", "step")
MARKERS = "<!-- card-sim: begin -->", "<!-- card-sim: end -->"


@dataclass(frozen=True, slots=True)
class Compared:
    """Bytes of a run by phase, planned and simulated, and what torch needs of the card for it."""

    planned: dict[str, int]
    simulated: dict[str, int]
    needed: int  # with expandable segments, as train.py sets them
    needed_without: int

    def problems(self) -> list[str]:
        """Return what is out of bounds."""
        found = out_of_bounds(self.planned, self.simulated)
        if self.needed > (planned := reserved(self.peak)):
            found.append(f"torch needs {self.needed / GIB:.2f} GiB, and {planned / GIB:.2f} are planned")
        return found

    @property
    def peak(self) -> int:
        return max(self.simulated.values())


def planned_bytes(job: Job) -> dict[str, int]:
    """Planned bytes of each phase, without the CUDA graphs' memory, which is not simulated."""
    return {phase.name: phase.gpu_bytes - phase.gpu.get("CUDA graphs", 0) for phase in job.plan().phases}


def out_of_bounds(planned: Mapping[str, int], simulated: Mapping[str, int]) -> list[str]:
    """Return a line for each phase whose plan is too far from its simulation."""
    errors = {phase: (planned[phase] - size) / size for phase, size in simulated.items()}
    wrong = {phase: error for phase, error in errors.items() if not -MOST_UNDER <= error <= MOST_OVER}
    return [f"{phase} is planned {error:+.1%} away from what was simulated" for phase, error in wrong.items()]


def compare(job: Job) -> Compared:
    from tests.card.run import simulate  # imports torch

    run = simulate(job)
    return Compared(planned_bytes(job), run.allocated, run.card(expandable=True), run.card())


def compare_all(jobs: Sequence[Job]) -> list[Compared]:
    """Compare each distinct job once, on all cores."""
    distinct = {sizes(job): job for job in jobs}
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = dict(zip(distinct, pool.map(compare, distinct.values()), strict=True))
    return [found[sizes(job)] for job in jobs]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", metavar="FILE", help="write the table between the markers of this file")
    parser.add_argument("--of", help="only rows of README, configs, docs/recipes.md or --model auto")
    arguments = parser.parse_args(words)
    os.chdir(ROOT)
    chosen = [row for row in rows() if arguments.of in (None, row.of)]
    jobs = [row.job() for row in chosen]
    compared = compare_all(jobs)
    table = as_table(chosen, jobs, compared)
    print(table)
    problems = [f"{row.of}, {row.flags}: {it}" for row, c in zip(chosen, compared, strict=True) for it in c.problems()]
    print(*dict.fromkeys(problems), sep="\n", file=sys.stderr)
    if arguments.docs:
        write(Path(arguments.docs), table)
    return bool(problems)


def as_table(chosen: Sequence[Row], jobs: Sequence[Job], compared: Sequence[Compared]) -> str:
    """Return Markdown; runs that need the same are one line."""
    lines = [
        f"`make card-sim` on {time.strftime('%Y-%m-%d')}: **simulated**, no card, an RTX 30/40's kernels. GiB of",
        "GPU memory, planned / simulated, in each phase; then what torch's allocator needs for the whole run, with",
        "expandable segments (which `train.py` sets) and without. CUDA's context and graphs come on top.",
        "",
        "| run | cards | checkpointing, sampled at once | " + " | ".join(PHASES) + " | needs | without |",
        "|---" * (len(PHASES) + 5) + "|",
    ]
    cards: dict[tuple[str, ...], set[int]] = {}
    for row, job, c in zip(chosen, jobs, compared, strict=True):
        cells = [f"{c.planned[phase] / GIB:.2f} / {c.simulated[phase] / GIB:.2f}" for phase in PHASES]
        chose = f"{'off' if job.config.gradient_checkpointing is False else 'on'}, {job.config.generation_batch_size}"
        key = f"`{row.flags}`", chose, *cells, f"{c.needed / GIB:.2f}", f"{c.needed_without / GIB:.2f}"
        cards.setdefault(key, set()).add(row.card)
    for (run, *rest), fitting in cards.items():
        lines.append(f"| {run} | {', '.join(map(str, sorted(fitting)))} | {' | '.join(rest)} |")
    return "\n".join(lines)


def write(file: Path, table: str) -> None:
    text = file.read_text(encoding="utf-8")
    (before, _), (_, after) = text.split(MARKERS[0]), text.split(MARKERS[1])
    file.write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
