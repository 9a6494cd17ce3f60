"""Charts as SVG inside the page: drawn by matplotlib, coloured by the page's CSS, in its light and dark theme.

A chart contains no text of a run, only numbers on its axes: names are in the legends, which the page writes.
"""

import io
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 420, 220  # of the viewBox; about the pixels of a chart on the page
FONT = 14
# Position of the axes, as shares: left, bottom, width, height. All charts have the same, so that their steps align.
AXES_POSITION = (54 / WIDTH, 28 / HEIGHT, 352 / WIDTH, 180 / HEIGHT)
SERIES = 6  # number of colours in page.css
MUTED, RULE, TEXT = "#fe00f1", "#fe00f2", "#fe00f3"  # placeholders for the page's colours
DASHES = ("-", (0, (6, 2.5)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)), (0, (10, 3)), (0, (3, 2)))
FAINT = 0.3  # opacity of points behind the line that smooths them

Points = Sequence[tuple[float, float]]


def colour(number: int) -> str:
    """Return the placeholder for the colour of series `number`, which the page replaces by its own."""
    return f"#fe000{number % SERIES + 1}"


@dataclass(frozen=True, slots=True)
class Line:
    """A line with a gap for each NaN, and the points that it smooths, if any."""

    line: Points
    points: Points
    number: int  # index of colour and dashes


@dataclass(frozen=True, slots=True)
class Area:
    """A filled band: heights `below` and `above` between neighbouring edges, so there is one more edge than heights."""

    edges: Sequence[float]
    below: Sequence[float]
    above: Sequence[float]
    number: int  # index of the colour


def line_chart(name: str, lines: Sequence[Line], *, level: float | None = None, percent: bool = False) -> str:
    """Draw values by step; the axis includes 0. level: height of a dotted line across the chart."""
    with _axes(name, percent=percent) as (axes, svg):
        for line in lines:
            look = {"color": colour(line.number), "zorder": 3}
            if line.points:
                axes.plot(*zip(*line.points, strict=True), "o", markersize=3, alpha=FAINT, markeredgewidth=0, **look)
            marker = "o" if len(line.line) <= 30 else None  # a single step has no line
            style = DASHES[line.number % len(DASHES)]
            axes.plot(
                *zip(*line.line, strict=True), linestyle=style, marker=marker, markersize=3.5, linewidth=1.8, **look
            )
        if level is not None:
            axes.axhline(level, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.5)
        if percent:
            axes.set_ylim(-0.02, 1.02)
        elif axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
        _whole_steps(axes)
    return svg[0]


def area_chart(name: str, areas: Sequence[Area], *, level: float | None = None, by_step: bool = True) -> str:
    """Draw filled bands over a common axis. level: height of a dashed line across the chart."""
    with _axes(name) as (axes, svg):
        for area in areas:
            heights = ([*values, values[-1]] for values in (area.below, area.above))
            axes.fill_between(area.edges, *heights, step="post", color=colour(area.number), linewidth=0, zorder=3)
        if level is not None:
            axes.axhline(level, color=TEXT, linestyle=(0, (6, 3)), linewidth=1.2, zorder=4)
        axes.set_xlim(areas[0].edges[0], areas[0].edges[-1])
        axes.set_ylim(bottom=0)
        if by_step:
            _whole_steps(axes)
    return svg[0]


@contextmanager
def _axes(name: str, *, percent: bool = False) -> Any:
    """Yield axes to draw on and a list that afterwards holds the content of the <svg> element."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    look: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": FONT,
        "axes.edgecolor": RULE,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes, svg = figure.add_axes(AXES_POSITION), list[str]()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.tick_params(length=0, labelcolor=MUTED, labelsize=FONT)
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        yield axes, svg
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
        svg.append(svg_content(name, file.getvalue()))


def _whole_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def svg_content(name: str, svg: str) -> str:
    """Return the content of matplotlib's <svg> with ids unique to the chart, the page's colours and no style rules."""
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    body = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    body = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\1{name}-", body)
    body = re.sub(r"#fe000(\d)", r"var(--series-\1)", body)
    for placeholder, variable in ((MUTED, "muted"), (RULE, "rule"), (TEXT, "text")):
        body = body.replace(placeholder, f"var(--{variable})")
    return body
