"""Planned and measured memory side by side: a table, memory.json, and a timeline that opens offline."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from grpo_ds.memory.phases import PhaseUse, Profiler, Span
from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.report.plan import PLACES
from grpo_ds.report.reading import MEMORY_FILE

TIMELINE_FILE = "memory.svg"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A phase on one of the two memories, in bytes; what was not planned (evaluation) has no plan."""

    phase: str
    seconds: float
    measured: int
    planned: int | None

    @property
    def difference(self) -> float | None:
        """Of the measured peak from the plan, as a share of the measured; above 0 the plan was too low."""
        return (self.measured - self.planned) / self.measured if self.planned and self.measured else None


def compare(uses: Sequence[PhaseUse], plan: Plan | None, where: Where) -> list[Comparison]:
    """Each measured phase beside its plan."""
    planned = {phase.name: phase.bytes_on(where) for phase in plan.phases} if plan else {}
    return [Comparison(use.phase, use.seconds, use.peak(where), planned.get(use.phase)) for use in uses]


def diagnosis(rows: Sequence[Comparison], plan: Plan | None, where: Where) -> str:
    """One sentence on the phase that decides whether the run fits."""
    worst = max(rows, key=lambda row: row.measured)
    sentence = f"On the {PLACES[where]}, {worst.phase} binds with {worst.measured / GIB:.2f} GiB"
    parts = next((_parts(phase, where) for phase in plan.phases if phase.name == worst.phase), {}) if plan else {}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    if largest:
        sentence += ", mostly " + ", ".join(f"{name} ({size / GIB:.2f})" for name, size in largest)
    return sentence + "."


def write_memory(profiler: Profiler, folder: Path) -> tuple[Path, Path]:
    """memory.json and memory.svg in `folder`."""
    uses, plan = list(profiler.uses().values()), profiler.plan
    planned = {phase.name: {"gpu": phase.gpu, "host": phase.host} for phase in plan.phases} if plan else {}
    report = {
        "measured": [asdict(use) for use in uses],
        "planned": planned,
        "spans": [asdict(span) for span in profiler.spans],
    }
    json_file, svg_file = folder / MEMORY_FILE, folder / TIMELINE_FILE
    json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(profiler.spans, plan, svg_file)
    return json_file, svg_file


def draw(spans: Sequence[Span], plan: Plan | None, file: Path) -> None:
    """Peak of every stretch of the run over time, coloured by phase, the plan a dark line across it; by its suffix SVG
    or PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    places: list[Where] = ["gpu", "host"] if any(span.gpu_peak for span in spans) else ["host"]
    figure, axes = pyplot.subplots(len(places), 1, figsize=(10, 3.2 * len(places)), sharex=True, squeeze=False)
    phases = list(dict.fromkeys(span.phase for span in spans))
    colours = dict(zip(phases, cycle(pyplot.get_cmap("tab20").colors), strict=False))  # type: ignore[attr-defined]
    for axis, where in zip(axes[:, 0], places, strict=True):
        planned = {phase.name: phase.bytes_on(where) / GIB for phase in plan.phases} if plan else {}
        for phase in phases:
            some = [span for span in spans if span.phase == phase]
            heights = [(span.gpu_peak if where == "gpu" else span.host_peak) / GIB for span in some]
            starts, widths = [span.start for span in some], [span.seconds for span in some]
            axis.bar(starts, heights, widths, align="edge", color=colours[phase], label=phase)
            if phase in planned:
                ends = [start + width for start, width in zip(starts, widths, strict=True)]
                axis.hlines([planned[phase]] * len(some), starts, ends, colors="black", linewidth=1.5)
        axis.set_ylabel(f"{PLACES[where]}, GiB")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_title("Peak memory by phase; black: planned" if plan else "Peak memory by phase", loc="left")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _parts(phase, where: Where) -> dict[str, int]:
    return phase.gpu if where == "gpu" else phase.host
