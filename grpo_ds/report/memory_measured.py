"""Measured memory of the running process beside its plan: rows for the console, memory.json and memory.svg.

Imports torch through the profiler; memory_page.py shows the same figures from memory.json, without torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from grpo_ds.memory.phases import PhaseUse, Profiler, Span
from grpo_ds.memory.plan import GIB, MEMORY_NAMES, MemoryKind, Plan, relative_plan_error
from grpo_ds.run_folder.files import MEMORY_FILE, TIMELINE_FILE
from grpo_ds.system.files import replaced, write_whole


@dataclass(frozen=True, slots=True)
class Comparison:
    """Measured and planned peak of a phase in one memory, in bytes. planned: None for a phase without a plan."""

    phase: str
    measured: int
    planned: int | None

    @property
    def error(self) -> float | None:
        return relative_plan_error(self.measured, self.planned)


def compare(uses: Sequence[PhaseUse], plan: Plan | None, kind: MemoryKind) -> list[Comparison]:
    """Return each measured phase with its plan."""
    planned = {phase.name: phase.bytes_in(kind) for phase in plan.phases} if plan else {}
    return [Comparison(use.phase, use.peak(kind), planned.get(use.phase)) for use in uses]


def diagnosis(rows: Sequence[Comparison], plan: Plan | None, kind: MemoryKind) -> str:
    """Return a sentence about the largest phase, which decides if the run fits."""
    largest = max(rows, key=lambda row: row.measured)
    sentence = f"{MEMORY_NAMES[kind]}: {largest.phase} needs most, {largest.measured / GIB:.2f} GiB"
    components = {phase.name: phase.components(kind) for phase in plan.phases}.get(largest.phase, {}) if plan else {}
    if top := sorted(components.items(), key=lambda component: -component[1])[:3]:
        sentence += ", mostly " + ", ".join(f"{name} ({size / GIB:.2f})" for name, size in top)
    return sentence + "."


def write_memory(profiler: Profiler, folder: Path) -> tuple[Path, Path]:
    """Write memory.json and memory.svg into `folder`."""
    uses, plan = list(profiler.uses().values()), profiler.plan
    planned = {phase.name: {"gpu": phase.gpu, "ram": phase.ram} for phase in plan.phases} if plan else {}
    report = {
        "measured": [asdict(use) for use in uses],
        "planned": planned,
        "spans": [asdict(span) for span in profiler.spans],
    }
    json_file, svg_file = folder / MEMORY_FILE, folder / TIMELINE_FILE
    write_whole(json_file, json.dumps(report, indent=1) + "\n")
    draw_timeline(profiler.spans, plan, svg_file)
    return json_file, svg_file


def draw_timeline(spans: Sequence[Span], plan: Plan | None, file: Path) -> None:
    """Draw the peak of every span over time, coloured by phase, with the plan as a black line.

    The suffix of `file` chooses SVG or PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds: list[MemoryKind] = ["gpu", "ram"] if any(span.gpu_peak for span in spans) else ["ram"]
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(10, 3.2 * len(kinds)), sharex=True, squeeze=False)
    phases = list(dict.fromkeys(span.phase for span in spans))
    colours = dict(zip(phases, cycle(pyplot.get_cmap("tab20").colors), strict=False))  # type: ignore[attr-defined]
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        planned = {phase.name: phase.bytes_in(kind) / GIB for phase in plan.phases} if plan else {}
        for phase in phases:
            some = [span for span in spans if span.phase == phase]
            heights = [(span.gpu_peak if kind == "gpu" else span.ram_peak) / GIB for span in some]
            starts, widths = [span.start for span in some], [span.seconds for span in some]
            axis.bar(starts, heights, widths, align="edge", color=colours[phase], label=phase)
            if phase in planned:
                ends = [start + width for start, width in zip(starts, widths, strict=True)]
                axis.hlines([planned[phase]] * len(some), starts, ends, colors="black", linewidth=1.5)
        axis.set_ylabel(f"{MEMORY_NAMES[kind]}, GiB")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_title("Peak memory by phase; black: planned" if plan else "Peak memory by phase", loc="left")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    is_svg = file.suffix == ".svg"
    with replaced(file) as out:
        figure.savefig(out, format=file.suffix[1:], metadata={"Date": None} if is_svg else None)
    pyplot.close(figure)
