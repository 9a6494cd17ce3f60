"""memory.json on the page: each phase's peak beside its plan, and the peaks over time."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from grpo_ds.memory.plan import GIB, Where
from grpo_ds.report.charts import Area, area_chart
from grpo_ds.report.curves import OTHER_PHASES, PHASES, Chart, Legend
from grpo_ds.report.run_files import Row, RunFiles, mapping, number, rows, text

BINS = 240  # columns of the timeline
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


def phase_bars(run: RunFiles) -> dict[str, list[PhaseBar]]:
    """By memory: the card, where there is one, and RAM."""
    return {PLACES[where]: _bars(run.memory, where) for where in places(run.memory)}


def places(memory: Row) -> list[Where]:
    if not memory:
        return []
    on_card = any(number(row.get("gpu_peak")) for row in rows(memory["measured"]))
    return ["gpu", "host"] if on_card else ["host"]


def peak(memory: Row, where: Where) -> float:
    """GiB."""
    return max((number(row.get(f"{where}_peak")) or 0.0 for row in rows(memory["measured"])), default=0.0) / GIB


def timelines(run: RunFiles) -> list[Chart]:
    """One for each memory."""
    return [chart for where in places(run.memory) if (chart := _timeline(run.memory, where))]


def _bars(memory: Row, where: Where) -> list[PhaseBar]:
    planned = _planned(memory, where)
    found = [(text(row["phase"]), (number(row.get(f"{where}_peak")) or 0.0) / GIB) for row in rows(memory["measured"])]
    longest = max([size for _, size in found] + [planned.get(phase, 0.0) for phase, _ in found], default=0.0)
    return [PhaseBar(phase, size, planned.get(phase), longest) for phase, size in found]


def _planned(memory: Row, where: Where) -> dict[str, float]:
    """GiB by phase."""
    parts = {phase: mapping(mapping(plan)[where]) for phase, plan in mapping(memory.get("planned", {})).items()}
    return {phase: sum(number(size) or 0.0 for size in part.values()) / GIB for phase, part in parts.items() if part}


def _timeline(memory: Row, where: Where) -> Chart | None:
    """The highest peak of each of many equal stretches of time, in the colour of its phase."""
    spans = [span for span in rows(memory.get("spans", [])) if (number(span.get("seconds")) or 0) > 0]
    end = max((number(span["start"] + span["seconds"]) or 0.0 for span in spans), default=0.0)
    if not end:
        return None
    highest = _highest(spans, where, end)
    unit, divisor = next(choice for choice in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if end > 3 * choice[1] or choice[1] == 1)
    edges = [i * end / BINS / divisor for i in range(BINS + 1)]
    phases = sorted({phase for _, phase in highest if phase}, key=_colour)
    areas, none = [], [0.0] * BINS
    for number_ in dict.fromkeys(map(_colour, phases)):
        heights = [size if phase and _colour(phase) == number_ else 0.0 for size, phase in highest]
        areas.append(Area(edges, none, heights, number_))
    legends = [Legend(text(phase), _colour(phase), "area") for phase in phases if phase in PHASES]
    others = [text(phase) for phase in phases if phase not in PHASES]
    legends += [Legend(", ".join(others), OTHER_PHASES, "area")] if others else []
    plan = max(_planned(memory, where).values(), default=None)
    legends += [Legend("largest peak planned", 0, "plan", f"{plan:.2f}")] if plan else []
    caption = f"By {unit} since the start: the highest peak of every {end / BINS:.2g} seconds, in the colour of its phase."
    drawing = area_chart(f"memory-{where}", areas, level=plan, by_step=False)
    return Chart(f"Memory over time: {PLACES[where]}, GiB", Markup(drawing), legends, caption)


def _highest(spans: list[Row], where: Where, end: float) -> list[tuple[float, str]]:
    """(GiB, phase) of the highest peak in each of BINS stretches of the time until `end`."""
    found = [(0.0, "")] * BINS
    for span in spans:
        first = int(span["start"] / end * BINS)
        last = min(BINS - 1, int((span["start"] + span["seconds"]) / end * BINS))
        peak_here = (number(span.get(f"{where}_peak")) or 0.0) / GIB, str(span["phase"])
        for i in range(max(0, first), last + 1):
            found[i] = max(found[i], peak_here)
    return found


def _colour(phase: str) -> int:
    return PHASES.get(phase, OTHER_PHASES)
