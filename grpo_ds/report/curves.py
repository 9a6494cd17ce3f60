"""Which charts a run has, and what each says in words: legends with first and last value, captions, a text for who
cannot see it. A chart of what was not measured is left out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from grpo_ds.report import charts
from grpo_ds.report.charts import Area, Line
from grpo_ds.report.run_files import JsonObject, RunFiles, mapping, name, number

FEW = 20  # steps up to which every one is drawn as it is
LONGEST_MEAN = 51  # steps
MOST_DOTS = 150  # of a line; of a longer run a dot is a mean
MOST_BARS = 60
PHASES = {"sample": 0, "reference": 1, "update": 2, "step": 3, "evaluate": 4}  # and their colours
OTHERS = 5  # the colour of all other phases

Show = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Legend:
    """A name beside its colour."""

    name: str
    number: int
    kind: str  # line, area or level
    values: str = ""  # in words


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure of the page."""

    title: str
    drawing: Markup
    legends: list[Legend]
    caption: str

    @property
    def label(self) -> str:
        """The chart for who cannot see it."""
        told = "; ".join(" ".join(filter(None, (legend.name, legend.values))) for legend in self.legends)
        return f"{self.title}. {told}. {self.caption}"


def curves(run: RunFiles) -> list[Chart]:
    """In the order in which a person asks."""
    by_name = [metric for metric in _names(run.steps) if metric.startswith("rewards/")]
    few = by_name[: charts.SERIES - 1]
    more = f" {len(by_name) - len(few)} more rewards are not drawn." if len(by_name) > len(few) else ""
    rewards = {"reward": "total", **{metric: metric.removeprefix("rewards/") for metric in few}}
    shares = {
        "ended": "completions that ended by themselves",
        "frac_reward_zero_std": "groups with equal rewards",
        "clip_fraction": "clipped tokens",
    }
    made = [
        _lines(run.steps, "reward", "Reward", rewards, lambda v: f"{v:.2f}", more=more),
        accuracy(run),
        kl(run),
        _lines(run.steps, "length", "Completion length", {"completion_length": "tokens, mean"}, lambda v: f"{v:.0f}"),
        _lines(run.steps, "entropy", "Entropy of a token", {"entropy": "nats, mean"}, lambda v: f"{v:.2f}"),
        _lines(run.steps, "shares", "Shares of a step", shares, _percent, percent=True),
        _lines(run.steps, "gradients", "Gradient norm", {"grad_norm": "before clipping"}, lambda v: f"{v:.2f}"),
        seconds(run),
    ]
    return [chart for chart in made if chart]


def accuracy(run: RunFiles) -> Chart | None:
    """Of what is sampled in training, and of the greedy answers to the held-out questions."""
    made = _lines_of(run.steps, {"accuracy": "sampled in training"}, _percent)
    held_out = held_out_accuracy(run)
    if held_out:
        legend = Legend("held-out questions, greedy", 1, "line", _ends(held_out, _percent))
        made.append((Line(held_out, (), 1), legend))
    if not made:
        return None
    level = number(_grades(run).get("majority_baseline"))
    drawing = charts.line_chart("accuracy", [line for line, _ in made], level=level, percent=True)
    legends = [legend for _, legend in made]
    if level is not None:
        legends.append(Legend("always the commonest held-out label", 0, "level", _percent(level)))
    more = " Held-out: single evaluations." if held_out else ""
    return Chart("Accuracy", Markup(drawing), legends, _caption(run.steps, ["accuracy"]) + more)


def kl(run: RunFiles) -> Chart | None:
    """Nothing where no reference was loaded: the trainer then logs a KL of 0."""
    if not any(number(row.get("kl")) for row in run.steps):
        return None
    names = {"kl": "to the reference", "kl_floor": "floor: what an 8-bit copy of the start already has"}
    return _lines(run.steps, "kl", "KL a token", names, lambda v: f"{v:.4f}")


def seconds(run: RunFiles) -> Chart | None:
    """Phases on top of each other, each as high as it is long."""
    steps = run.steps
    names = [metric for metric in _names(steps) if metric.startswith("seconds/")]
    names.sort(key=lambda metric: PHASES.get(metric.removeprefix("seconds/"), OTHERS))
    if not names:
        return None
    size = math.ceil(len(steps) / MOST_BARS)
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    heights = [[_mean([number(row.get(metric)) or 0.0 for row in part]) for part in parts] for metric in names]
    tops = list(accumulate(heights, lambda below, more: [a + b for a, b in zip(below, more, strict=True)]))
    edges = [part[0]["step"] - 0.5 for part in parts] + [steps[-1]["step"] + 0.5]
    areas, legends = [], []
    for i, metric in enumerate(names):
        phase = metric.removeprefix("seconds/")
        number_ = PHASES.get(phase, OTHERS)
        below = tops[i - 1] if i else [0.0] * len(parts)
        areas.append(Area(edges, below, tops[i], number_))
        whole = sum(number(row.get(metric)) or 0.0 for row in steps)
        legends.append(Legend(name(phase), number_, "area", f"{whole / len(steps):.1f}"))
    caption = "Beside each phase its mean. By step" + (f", means of {size}." if size > 1 else ".")
    return Chart("Seconds a step", Markup(charts.area_chart("seconds", areas)), legends, caption)


def held_out_accuracy(run: RunFiles) -> list[tuple[float, float]]:
    """(step, accuracy) before, on the way and after."""
    found = {row["step"]: number(row.get("eval/accuracy")) for row in run.evaluations}
    found[0] = number(_grades(run, "before").get("accuracy"))
    if "after" in run.held_out and run.steps:
        found[run.steps[-1]["step"]] = number(_grades(run, "after").get("accuracy"))
    return [(step, share) for step, share in sorted(found.items()) if share is not None]


def _grades(run: RunFiles, when: str = "before") -> JsonObject:
    return mapping(run.held_out.get(when, {}))


def _lines(
    steps: list[JsonObject],
    drawn_as: str,
    title: str,
    named: dict[str, str],
    show: Show,
    *,
    percent: bool = False,
    more: str = "",
) -> Chart | None:
    made = _lines_of(steps, named, show)
    if not made:
        return None
    drawing = charts.line_chart(drawn_as, [line for line, _ in made], percent=percent)
    return Chart(title, Markup(drawing), [legend for _, legend in made], _caption(steps, list(named)) + more)


def _lines_of(steps: list[JsonObject], named: dict[str, str], show: Show) -> list[tuple[Line, Legend]]:
    """A line for each metric that was measured, with its legend."""
    made = []
    for i, (metric, called) in enumerate(named.items()):
        values = [(row["step"], _or_nan(row.get(metric))) for row in steps if metric in row]
        if any(math.isfinite(value) for _, value in values):
            line = smoothed(values, window(len(values)))
            dots = thinned(values) if len(values) > FEW else []
            made.append((Line(line, dots, i), Legend(name(called), i, "line", _ends(line, show))))
    return made


def window(count: int) -> int:
    """Steps that a line is the mean of, an odd number: 1 for a few, a tenth of many."""
    return 1 if count <= FEW else min(LONGEST_MEAN, max(5, count // 10 | 1))


def smoothed(values: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    """The mean over `size` neighbours, fewer at the ends; NaN where none of them is a number."""
    half = size // 2
    around = [[v for _, v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)] for i in range(len(values))]
    return [(step, _mean(some) if some else math.nan) for (step, _), some in zip(values, around, strict=True)]


def thinned(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_DOTS, each the mean of as many neighbours as that takes."""
    size = math.ceil(len(values) / MOST_DOTS)
    parts = [[pair for pair in values[i : i + size] if math.isfinite(pair[1])] for i in range(0, len(values), size)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in parts if part]


def _caption(steps: list[JsonObject], metrics: list[str]) -> str:
    """What a line is, and what is missing in it."""
    size, dot = window(len(steps)), math.ceil(len(steps) / MOST_DOTS)
    dots = "single steps" if dot == 1 else f"means of {dot} steps"
    said = [f"Line: mean of {size} steps, fewer at the ends; dots: {dots}." if size > 1 else "By step, not smoothed."]
    missing = sum(any(m in row and number(row[m]) is None for m in metrics) for row in steps)
    if missing:
        said.append(f"{missing} {'step' if missing == 1 else 'steps'} without a finite number left out.")
    return " ".join(said)


def _ends(line: Sequence[tuple[float, float]], show: Show) -> str:
    values = [value for _, value in line if math.isfinite(value)]
    first, last = show(values[0]), show(values[-1])
    return first if first == last else f"{first} → {last}"


def _names(steps: list[JsonObject]) -> list[str]:
    return list(dict.fromkeys(metric for row in steps for metric in row))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _or_nan(value: object) -> float:
    found = number(value)
    return math.nan if found is None else found


def _percent(share: float) -> str:
    return f"{share:.0%}"
