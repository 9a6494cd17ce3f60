"""memory.json on the page: each phase's peak beside its plan, and the peaks over time."""

import math
from dataclasses import dataclass

from markupsafe import Markup

from grpo_ds.memory.plan import GIB, Where
from grpo_ds.report.charts import Area, area_chart
from grpo_ds.report.curves import OTHERS, PHASES, Chart, Legend
from grpo_ds.report.run_files import JsonObject, RunFiles, mapping, name, number, rows

# Columns of the timeline: of a short run one shows one phase, of a long one the phases of several steps, for at sizes
# between the two chance would decide which phases a column holds.
MOST_APART, EACH_APART = 120, 240
MOST_TOGETHER, SPANS_TOGETHER = 60, 12
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
PLACES: dict[Where, str] = {"gpu": "card", "host": "RAM"}


@dataclass(frozen=True, slots=True)
class PhaseBar:
    """A phase's peak and plan, in GiB and as a share of the longest bar."""

    phase: str
    measured: float
    planned: float | None
    longest: float

    @property
    def off(self) -> str:
        """Of the measured peak from the plan, as a share of the measured; above 0 the plan was too low."""
        return f"{(self.measured - self.planned) / self.measured:+.0%}" if self.planned and self.measured else ""

    def percent(self, gib: float) -> str:
        return f"{100 * gib / self.longest:.1f}" if self.longest else "0"


@dataclass(frozen=True, slots=True)
class Bands:
    """Peaks in equal stretches of time, a band for each colour, before they are drawn."""

    where: Where
    areas: list[Area]
    legends: list[Legend]
    plan: float | None  # GiB, of the largest phase
    caption: str


@dataclass(frozen=True, slots=True)
class _Span:
    """An uninterrupted stretch of a phase."""

    phase: str
    start: float
    end: float
    peaks: dict[Where, float]  # GiB

    @property
    def number(self) -> int:
        """Of its colour."""
        return PHASES.get(self.phase, OTHERS)


def phase_bars(run: RunFiles) -> dict[str, list[PhaseBar]]:
    """By memory: the card, where there is one, and RAM."""
    return {PLACES[where]: _bars(run.memory, where) for where in places(run.memory)}


def places(memory: JsonObject) -> list[Where]:
    if not memory:
        return []
    on_card = any(number(row.get("gpu_peak")) for row in rows(memory["measured"]))
    return ["gpu", "host"] if on_card else ["host"]


def peak(memory: JsonObject, where: Where) -> float:
    """GiB."""
    return max((number(row.get(f"{where}_peak")) or 0.0 for row in rows(memory["measured"])), default=0.0) / GIB


def bands(run: RunFiles) -> list[Bands]:
    """One for each memory."""
    return [found for where in places(run.memory) if (found := _bands(run.memory, where))]


def timelines(run: RunFiles) -> list[Chart]:
    """The bands, drawn."""
    made = []
    for found in bands(run):
        drawing = area_chart(f"memory-{found.where}", found.areas, level=found.plan, by_step=False)
        title = f"Memory over time: {PLACES[found.where]}, GiB"
        made.append(Chart(title, Markup(drawing), found.legends, found.caption))
    return made


def _bars(memory: JsonObject, where: Where) -> list[PhaseBar]:
    planned = _planned(memory, where)
    found = [(name(row["phase"]), (number(row.get(f"{where}_peak")) or 0.0) / GIB) for row in rows(memory["measured"])]
    longest = max([size for _, size in found] + [planned.get(phase, 0.0) for phase, _ in found], default=0.0)
    return [PhaseBar(phase, size, planned.get(phase), longest) for phase, size in found]


def _planned(memory: JsonObject, where: Where) -> dict[str, float]:
    """GiB by phase."""
    parts = {phase: mapping(mapping(plan)[where]) for phase, plan in mapping(memory.get("planned", {})).items()}
    return {phase: sum(number(size) or 0.0 for size in part.values()) / GIB for phase, part in parts.items() if part}


def _bands(memory: JsonObject, where: Where) -> Bands | None:
    """Nothing where no time was measured."""
    spans = [span for span in map(_span, rows(memory.get("spans", []))) if span.end > span.start >= 0]
    end = max((span.end for span in spans), default=0.0)
    if not end:
        return None
    bins = EACH_APART if len(spans) <= MOST_APART else min(MOST_TOGETHER, len(spans) // SPANS_TOGETHER)
    highest = [_highest(part, where) for part in _binned(spans, end, bins)]
    unit, length = next((unit, length) for unit, length in UNITS.items() if end > 3 * length or length == 1)
    edges = [i * end / bins / length for i in range(bins + 1)]
    numbers = sorted({of for peaks in highest for of in peaks})
    ends = {of: [_band(peaks, of) for peaks in highest] for of in numbers}
    areas = [Area(edges, [low for low, _ in band], [high for _, high in band], of) for of, band in ends.items()]
    planned = _planned(memory, where)
    plan = max((planned[span.phase] for span in spans if span.phase in planned), default=None)
    legends = [Legend(", ".join(dict.fromkeys(s.phase for s in spans if s.number == of)), of, "area") for of in numbers]
    legends += [Legend("largest peak planned", 0, "plan", f"{plan:.2f}")] if plan else []
    caption = f"By {unit}. Each colour ends at the highest peak of its phase in every {end / bins:.2g} seconds."
    return Bands(where, areas, legends, plan, caption)


def _span(row: JsonObject) -> "_Span":
    peaks = {where: (number(row.get(f"{where}_peak")) or 0.0) / GIB for where in PLACES}
    start = number(row["start"]) or 0.0
    return _Span(name(row["phase"]), start, start + (number(row["seconds"]) or 0.0), peaks)


def _binned(spans: list["_Span"], end: float, bins: int) -> list[list["_Span"]]:
    """The spans that touch each of `bins` equal stretches of the time until `end`."""
    found: list[list[_Span]] = [[] for _ in range(bins)]
    for span in spans:
        for i in range(int(span.start / end * bins), min(bins, math.ceil(span.end / end * bins))):
            found[i].append(span)
    return found


def _highest(spans: list["_Span"], where: Where) -> dict[int, float]:
    """The highest peak of each colour."""
    return {of: max(span.peaks[where] for span in spans if span.number == of) for of in {span.number for span in spans}}


def _band(peaks: dict[int, float], of: int) -> tuple[float, float]:
    """From the next lower peak of another colour up to its own."""
    if of not in peaks:
        return 0.0, 0.0
    mine = peaks[of], of
    return max((peak for number_, peak in peaks.items() if (peak, number_) < mine), default=0.0), peaks[of]
