"""Curves of the page: reward, accuracy, KL, length, entropy, shares, gradient norm and seconds, step by step.

One function per curve (`reward_curve`, `accuracy_curve`, ...). Each chart carries words: a legend with first and last
value, a caption, and a text for people who cannot see it. Metrics that were not measured have no chart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from grpo_ds.report import charts
from grpo_ds.report.charts import Area, Line
from grpo_ds.report.metric_names import CLIPPED_RATIO, MEAN_LENGTH, reward_name
from grpo_ds.report.run_files import JsonObject, RunFiles, as_label, as_number, as_object

FEW = 20  # up to this number of steps, each step is drawn
LONGEST_MEAN = 51  # steps
MOST_DOTS = 150  # per line; in a longer run a dot is a mean
MOST_BARS = 60
PHASES = {"sample": 0, "reference": 1, "update": 2, "step": 3, "evaluate": 4}  # phase -> index of its colour
OTHERS = 5  # colour of all other phases

Show = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Legend:
    """A name beside its colour."""

    name: str
    number: int
    kind: str  # line, area, level or plan
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
        """Text of the chart for people who cannot see it."""
        legends = "; ".join(" ".join(filter(None, (legend.name, legend.values))) for legend in self.legends)
        return f"{self.title}. {legends}. {self.caption}"


def curves(run: RunFiles) -> list[Chart]:
    """Draw all curves, the most important first."""
    drawn = [
        reward_curve(run),
        accuracy_curve(run),
        kl_curve(run),
        _curve(run.steps, "length", "Completion length", {MEAN_LENGTH: "tokens, mean"}, lambda v: f"{v:.0f}"),
        _curve(run.steps, "entropy", "Entropy per token", {"entropy": "nats, mean"}, lambda v: f"{v:.2f}"),
        shares_curve(run),
        _curve(run.steps, "gradients", "Gradient norm", {"grad_norm": "before clipping"}, lambda v: f"{v:.2f}"),
        seconds_chart(run),
    ]
    return [chart for chart in drawn if chart]


def reward_curve(run: RunFiles) -> Chart | None:
    """Draw the mean reward, in total and by reward function."""
    means = {metric: name for metric in _metrics(run.steps) if (name := reward_name(metric))}
    shown = dict(list(means.items())[: charts.SERIES - 1])
    note = f" {len(means) - len(shown)} more rewards are not drawn." if len(means) > len(shown) else ""
    return _curve(run.steps, "reward", "Reward", {"reward": "total", **shown}, lambda v: f"{v:.2f}", note=note)


def accuracy_curve(run: RunFiles) -> Chart | None:
    """Draw the accuracy of sampled completions, and accuracy and p(right) of the held-out questions."""
    held_out = held_out_lines(run)
    drawn = [*_lines(run.steps, {"accuracy": "sampled in training"}, _percent), *held_out]
    if not drawn:
        return None
    level = as_number(_grades(run).get("majority_baseline"))
    drawing = charts.line_chart("accuracy", [line for line, _ in drawn], level=level, percent=True)
    legends = [legend for _, legend in drawn]
    if level is not None:
        legends.append(Legend("held-out majority baseline: always the most common label", 0, "level", _percent(level)))
    note = " Held-out: single evaluations." if held_out else ""
    return Chart("Accuracy", Markup(drawing), legends, _caption(run.steps, ["accuracy"]) + note)


def kl_curve(run: RunFiles) -> Chart | None:
    """Draw the KL and its floor; no chart without a reference (the trainer then logs a KL of 0)."""
    if not any(as_number(row.get("kl")) for row in run.steps):
        return None
    names = {"kl": "nats to the reference", "kl_floor": "floor: KL of an 8-bit copy of the same policy"}
    return _curve(run.steps, "kl", "KL per token", names, lambda v: f"{v:.4f}")


def shares_curve(run: RunFiles) -> Chart | None:
    """Draw the shares that show if a step can teach anything: cut completions, equal rewards, clipped tokens."""
    names = {
        CLIPPED_RATIO: "completions cut at the length limit",
        "frac_reward_zero_std": "groups with equal rewards",
        "clip_ratio/region_mean": "tokens with a clipped ratio",
    }
    return _curve(run.steps, "shares", "Shares per step", names, _percent, percent=True)


def seconds_chart(run: RunFiles) -> Chart | None:
    """Draw the seconds of each phase, stacked."""
    steps = run.steps
    metrics = [metric for metric in _metrics(steps) if metric.startswith("seconds/")]
    metrics.sort(key=lambda metric: PHASES.get(metric.removeprefix("seconds/"), OTHERS))
    if not metrics:
        return None
    size = math.ceil(len(steps) / MOST_BARS)
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    heights = [[_mean([as_number(row.get(metric)) or 0.0 for row in part]) for part in parts] for metric in metrics]
    tops = list(accumulate(heights, lambda below, more: [a + b for a, b in zip(below, more, strict=True)]))
    edges = [part[0]["step"] - 0.5 for part in parts] + [steps[-1]["step"] + 0.5]
    areas, legends = [], []
    for i, metric in enumerate(metrics):
        phase = metric.removeprefix("seconds/")
        colour = PHASES.get(phase, OTHERS)
        below = tops[i - 1] if i else [0.0] * len(parts)
        areas.append(Area(edges, below, tops[i], colour))
        total = sum(as_number(row.get(metric)) or 0.0 for row in steps)
        legends.append(Legend(as_label(phase), colour, "area", f"{total / len(steps):.1f}"))
    caption = "The legend has each phase's mean. By step" + (f", means of {size}." if size > 1 else ".")
    return Chart("Seconds per step", Markup(charts.area_chart("seconds", areas)), legends, caption)


def held_out_lines(run: RunFiles) -> list[tuple[Line, Legend]]:
    """Return the lines of evaluations: accuracy of greedy answers and, if it is known, mean p(right)."""
    names = {"held-out questions, greedy": "accuracy", "held-out questions, mean p(right)": "mean_p_right"}
    points = {name: _held_out_points(run, figure) for name, figure in names.items()}
    return [
        (Line(points[name], (), number), Legend(name, number, "line", _ends(points[name], _percent)))
        for number, name in enumerate(names, start=1)
        if points[name]
    ]


def _held_out_points(run: RunFiles, figure: str) -> list[tuple[float, float]]:
    """Return (step, value) of the evaluations before, during and after training."""
    by_step = {row["step"]: as_number(row.get(f"eval/{figure}")) for row in run.evaluations}
    by_step[0] = as_number(_grades(run, "before").get(figure))
    if "after" in run.held_out and run.steps:
        by_step[run.steps[-1]["step"]] = as_number(_grades(run, "after").get(figure))
    return [(step, value) for step, value in sorted(by_step.items()) if value is not None]


def _grades(run: RunFiles, when: str = "before") -> JsonObject:
    return as_object(run.held_out.get(when, {}))


def _curve(
    steps: list[JsonObject],
    drawn_as: str,
    title: str,
    names: dict[str, str],
    show: Show,
    *,
    percent: bool = False,
    note: str = "",
) -> Chart | None:
    """Draw a line for each metric of names: metric -> its name in the legend."""
    drawn = _lines(steps, names, show)
    if not drawn:
        return None
    drawing = charts.line_chart(drawn_as, [line for line, _ in drawn], percent=percent)
    return Chart(title, Markup(drawing), [legend for _, legend in drawn], _caption(steps, list(names)) + note)


def _lines(steps: list[JsonObject], names: dict[str, str], show: Show) -> list[tuple[Line, Legend]]:
    """Return a line and its legend for each metric that was measured."""
    drawn = []
    for i, (metric, name) in enumerate(names.items()):
        values = [(row["step"], _or_nan(row.get(metric))) for row in steps if metric in row]
        if any(math.isfinite(value) for _, value in values):
            line = smoothed(values, window(len(values)))
            dots = thinned(values) if len(values) > FEW else []
            drawn.append((Line(line, dots, i), Legend(as_label(name), i, "line", _ends(line, show))))
    return drawn


def window(count: int) -> int:
    """Return the number of steps in the mean that a line shows, always odd: 1 for few steps, a tenth of many."""
    return 1 if count <= FEW else min(LONGEST_MEAN, max(5, count // 10 | 1))


def smoothed(values: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    """Return means over `size` neighbours, fewer at the ends; NaN if none of them is a number."""
    half = size // 2
    around = [[v for _, v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)] for i in range(len(values))]
    return [(step, _mean(some) if some else math.nan) for (step, _), some in zip(values, around, strict=True)]


def thinned(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MOST_DOTS points, each the mean of the same number of neighbours."""
    size = math.ceil(len(values) / MOST_DOTS)
    parts = [[pair for pair in values[i : i + size] if math.isfinite(pair[1])] for i in range(0, len(values), size)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in parts if part]


def _caption(steps: list[JsonObject], metrics: list[str]) -> str:
    """Return the caption: how a line is smoothed, and the steps that are missing."""
    size, dot = window(len(steps)), math.ceil(len(steps) / MOST_DOTS)
    dots = "single steps" if dot == 1 else f"means of {dot} steps"
    parts = [f"Line: mean of {size} steps, fewer at the ends; dots: {dots}." if size > 1 else "By step, not smoothed."]
    missing = sum(any(metric in row and as_number(row[metric]) is None for metric in metrics) for row in steps)
    if missing:
        parts.append(f"{missing} {'step' if missing == 1 else 'steps'} without a finite number left out.")
    return " ".join(parts)


def _ends(line: Sequence[tuple[float, float]], show: Show) -> str:
    values = [value for _, value in line if math.isfinite(value)]
    first, last = show(values[0]), show(values[-1])
    return first if first == last else f"{first} → {last}"


def _metrics(steps: list[JsonObject]) -> list[str]:
    return list(dict.fromkeys(metric for row in steps for metric in row))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _or_nan(value: object) -> float:
    number = as_number(value)
    return math.nan if number is None else number


def _percent(share: float) -> str:
    return f"{share:.0%}"
