"""Memory on the page, from memory.json: each phase's peak beside its plan, and the peaks over time. No torch."""

import math
from dataclasses import dataclass

from markupsafe import Markup

from grpo_ds.memory.plan import GIB, MEMORY_NAMES, MemoryKind, relative_plan_error
from grpo_ds.report.charts import Area, area_chart
from grpo_ds.report.curves import OTHERS, PHASES, Chart, Legend
from grpo_ds.report.run_files import JsonObject, RunFiles, as_label, as_number, as_object, as_objects

# Columns of the timeline. In a short run a column shows one phase, in a long run the phases of several steps; with
# another number of columns it would be random which phases a column shows.
MOST_APART, EACH_APART = 120, 240
MOST_TOGETHER, SPANS_TOGETHER = 60, 12
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}


@dataclass(frozen=True, slots=True)
class PhaseBar:
    """A phase's peak and plan in GiB; longest: the length of the longest bar, in GiB."""

    phase: str
    measured: float
    planned: float | None
    longest: float

    @property
    def plan_error(self) -> str:
        error = relative_plan_error(self.measured, self.planned)
        return "" if error is None else f"{error:+.0%}"

    def percent(self, gib: float) -> str:
        return f"{100 * gib / self.longest:.1f}" if self.longest else "0"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Peaks in equal stretches of time, a band for each colour, before they are drawn."""

    kind: MemoryKind
    areas: list[Area]
    legends: list[Legend]
    plan: float | None  # GiB, of the largest phase
    caption: str


@dataclass(frozen=True, slots=True)
class _PhaseSpan:
    """An uninterrupted stretch of a phase."""

    phase: str
    start: float
    end: float
    peaks: dict[MemoryKind, float]  # GiB

    @property
    def colour(self) -> int:
        return PHASES.get(self.phase, OTHERS)


def phase_bars(run: RunFiles) -> dict[str, list[PhaseBar]]:
    """Return the bars of each memory that the run used, by its name."""
    return {MEMORY_NAMES[kind]: _bars(run.memory, kind) for kind in kinds(run.memory)}


def kinds(memory: JsonObject) -> list[MemoryKind]:
    """Return the kinds of memory that the run used."""
    if not memory:
        return []
    on_card = any(as_number(row.get("gpu_peak")) for row in as_objects(memory["measured"]))
    return ["gpu", "ram"] if on_card else ["ram"]


def peak_gib(memory: JsonObject, kind: MemoryKind) -> float:
    """Return the largest peak of all phases."""
    peaks = [as_number(row.get(f"{kind}_peak")) or 0.0 for row in as_objects(memory["measured"])]
    return max(peaks, default=0.0) / GIB


def timelines(run: RunFiles) -> list[Timeline]:
    """Compute a timeline for each kind of memory."""
    return [timeline for kind in kinds(run.memory) if (timeline := _timeline(run.memory, kind))]


def timeline_charts(run: RunFiles) -> list[Chart]:
    """Draw the timelines."""
    drawn = []
    for timeline in timelines(run):
        drawing = area_chart(f"memory-{timeline.kind}", timeline.areas, level=timeline.plan, by_step=False)
        title = f"Memory over time: {MEMORY_NAMES[timeline.kind]}, GiB"
        drawn.append(Chart(title, Markup(drawing), timeline.legends, timeline.caption))
    return drawn


def _bars(memory: JsonObject, kind: MemoryKind) -> list[PhaseBar]:
    planned = _planned(memory, kind)
    peaks = [
        (as_label(row["phase"]), (as_number(row.get(f"{kind}_peak")) or 0.0) / GIB)
        for row in as_objects(memory["measured"])
    ]
    longest = max([size for _, size in peaks] + [planned.get(phase, 0.0) for phase, _ in peaks], default=0.0)
    return [PhaseBar(phase, size, planned.get(phase), longest) for phase, size in peaks]


def _planned(memory: JsonObject, kind: MemoryKind) -> dict[str, float]:
    """Return phase -> planned GiB."""
    parts = {phase: as_object(as_object(plan)[kind]) for phase, plan in as_object(memory.get("planned", {})).items()}
    return {phase: sum(as_number(size) or 0.0 for size in part.values()) / GIB for phase, part in parts.items() if part}


def _timeline(memory: JsonObject, kind: MemoryKind) -> Timeline | None:
    """Compute a timeline; None if no time was measured."""
    spans = [span for span in map(_phase_span, as_objects(memory.get("spans", []))) if span.end > span.start >= 0]
    end = max((span.end for span in spans), default=0.0)
    if not end:
        return None
    columns = EACH_APART if len(spans) <= MOST_APART else min(MOST_TOGETHER, len(spans) // SPANS_TOGETHER)
    highest = [_highest(part, kind) for part in _by_column(spans, end, columns)]
    unit, length = next((unit, length) for unit, length in UNITS.items() if end > 3 * length or length == 1)
    edges = [i * end / columns / length for i in range(columns + 1)]
    colours = sorted({colour for peaks in highest for colour in peaks})
    bands = {colour: [_band(peaks, colour) for peaks in highest] for colour in colours}
    areas = [Area(edges, [low for low, _ in band], [high for _, high in band], of) for of, band in bands.items()]
    planned = _planned(memory, kind)
    plan = max((planned[span.phase] for span in spans if span.phase in planned), default=None)
    names = {colour: ", ".join(dict.fromkeys(s.phase for s in spans if s.colour == colour)) for colour in colours}
    legends = [Legend(name, colour, "area") for colour, name in names.items()]
    legends += [Legend("largest planned peak", 0, "plan", f"{plan:.2f}")] if plan else []
    caption = f"By {unit}. Each colour ends at the highest peak of its phase in every {end / columns:.2g} seconds."
    return Timeline(kind, areas, legends, plan, caption)


def _phase_span(row: JsonObject) -> "_PhaseSpan":
    peaks = {kind: (as_number(row.get(f"{kind}_peak")) or 0.0) / GIB for kind in MEMORY_NAMES}
    start = as_number(row["start"]) or 0.0
    return _PhaseSpan(as_label(row["phase"]), start, start + (as_number(row["seconds"]) or 0.0), peaks)


def _by_column(spans: list["_PhaseSpan"], end: float, columns: int) -> list[list["_PhaseSpan"]]:
    """Return the spans that touch each of `columns` equal stretches of the time until `end`."""
    by_column: list[list[_PhaseSpan]] = [[] for _ in range(columns)]
    for span in spans:
        for i in range(int(span.start / end * columns), min(columns, math.ceil(span.end / end * columns))):
            by_column[i].append(span)
    return by_column


def _highest(spans: list["_PhaseSpan"], kind: MemoryKind) -> dict[int, float]:
    """Return colour -> highest peak."""
    colours = {span.colour for span in spans}
    return {colour: max(span.peaks[kind] for span in spans if span.colour == colour) for colour in colours}


def _band(peaks: dict[int, float], colour: int) -> tuple[float, float]:
    """Return the lower and upper end of a band: the next lower peak of another colour, and its own peak."""
    if colour not in peaks:
        return 0.0, 0.0
    own = peaks[colour], colour
    return max((peak for other, peak in peaks.items() if (peak, other) < own), default=0.0), peaks[colour]
