"""The pictures of docs/how_it_works.md: `python docs/pictures.py` writes docs/*.svg.

Their own background makes them readable on a light and a dark page. Text stays text, and the same matplotlib always
writes the same bytes. Coordinates are inches.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

HERE = Path(__file__).resolve().parent
PAPER, INK, EDGE, CARD, RAM, HIDDEN = "#ffffff", "#1f2933", "#52606d", "#dceaf7", "#f6ead6", "#e4e7eb"
PROMPT, COMPLETIONS = "#0072b2", ("#e69f00", "#b87a00")  # in turn, to tell neighbours apart
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "grpo_ds",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the widest first: others need less room
    "font.size": 10,
    "text.color": INK,
}

# The boxes of a step: name, words, left edge, bottom, width.
HEIGHT = 1.05
BOXES = {
    "Sample": ("G completions each; a\nprompt's keys kept once", 0.85, 3.85, 2.45),
    "Packed row": ("prompt | c1 | ... | cG", 4.05, 3.85, 2.1),
    "Reference": ("int8; log-probs\n(none with beta 0)", 6.9, 4.55, 2.15),
    "Policy": ("bf16; log-probs, by\nchunks of the vocabulary", 6.9, 3.15, 2.15),
    "Loss": ("clipped ratio x advantage,\nbeta x KL; one backward", 9.6, 3.85, 2.3),
    "Questions": ("Q, as prompts", 0.3, 0.75, 1.85),
    "Rewards": ("functions on text,\nyours or ours", 2.6, 0.75, 1.8),
    "Advantages": ("reward minus the mean\nof its group, / std", 4.95, 0.75, 1.95),
    "8-bit AdamW": ("master weights 4, gradients 4,\nmoments 2: 10 bytes a parameter", 8.95, 0.75, 2.95),
}
# Arrows: their points, their words, and the place of the words.
ARROWS = (
    (((1.5, 1.8), (1.5, 3.85)), "", (0, 0)),
    (((2.95, 3.85), (2.95, 1.8)), "texts", (2.5, 2.62)),
    (((4.4, 1.27), (4.95, 1.27)), "", (0, 0)),
    (((3.3, 4.37), (4.05, 4.37)), "tokens", (3.68, 4.47)),
    (((6.15, 4.6), (6.5, 4.6), (6.5, 5.07), (6.9, 5.07)), "", (0, 0)),
    (((6.15, 4.15), (6.5, 4.15), (6.5, 3.67), (6.9, 3.67)), "", (0, 0)),
    (((9.05, 5.07), (9.3, 5.07), (9.3, 4.6), (9.6, 4.6)), "", (0, 0)),
    (((9.05, 3.67), (9.3, 3.67), (9.3, 4.15), (9.6, 4.15)), "", (0, 0)),
    (((5.92, 1.8), (5.92, 2.62), (10.15, 2.62), (10.15, 3.85)), "one number each", (6.02, 2.72)),
    (((11.3, 3.85), (11.3, 1.8)), "gradients", (10.82, 2.62)),
    (((8.95, 1.27), (7.97, 1.27), (7.97, 3.15)), "new weights,\n16 bits", (7.42, 1.8)),
)

# The shape measured in docs/performance.md. A completion's last token is a target, but no input.
P, G, C = 384, 8, 64
OWN = C - 1
PACKED, REPEATED = P + G * OWN, G * (P + C)
SCALE = 3.5 / PACKED  # inches a token


def main(folder: Path = HERE) -> None:
    with matplotlib.rc_context(STYLE):
        for name, draw in (("step", one_step), ("packed_row", packed_row)):
            figure = draw()
            figure.savefig(folder / f"{name}.svg", facecolor=PAPER, metadata={"Date": None})
            plt.close(figure)


def one_step() -> plt.Figure:
    """Draw a step from the questions to the new weights, and which memory holds what."""
    figure, axes = _canvas(12.2, 6.2)
    _rounded(axes, 0.1, 2.95, 12.0, 3.15, CARD, CARD)
    axes.text(0.3, 5.8, "GPU memory: weights of policy and reference, KV cache, activations", weight="bold", size=11)
    _rounded(axes, 0.1, 0.1, 12.0, 2.15, RAM, RAM)
    axes.text(0.3, 0.33, "RAM: data, rewards, the optimizer and its state", weight="bold", size=11)
    axes.text(11.9, 0.33, "Without a card: everything is in RAM", ha="right")
    for points, carried, place in ARROWS:
        _arrow(axes, points)
        axes.text(*place, carried, ha="left" if len(points) > 3 else "center", va="bottom", size=9, style="italic")
    for name, (words, left, bottom, width) in BOXES.items():
        _rounded(axes, left, bottom, width, HEIGHT, PAPER, EDGE)
        axes.text(left + width / 2, bottom + 0.78, name, ha="center", va="center", weight="bold", size=11)
        axes.text(left + width / 2, bottom + 0.36, words, ha="center", va="center", size=9)
    return figure


def packed_row() -> plt.Figure:
    """Draw a group's tokens and the tokens that each sees, packed and in a row for each completion, to one scale."""
    figure, axes = _canvas(12.2, 5.2)
    axes.text(0.3, 4.85, "Packed: the prompt once", weight="bold", size=12)
    axes.text(0.3, 4.58, f"{P} + {G} x {OWN} = {PACKED} tokens; {_seen(P) + G * _behind(OWN):,} scores")
    _mask(axes, 0.3, 4.05, [OWN] * G, bar=0.32)
    axes.text(4.45, 4.85, "A row for each completion", weight="bold", size=12)
    axes.text(4.45, 4.58, f"{G} x ({P} + {C}) = {REPEATED:,} tokens; {G * _seen(P + C):,} scores")
    for number in range(G):
        _mask(axes, 4.45 + number % 4 * 1.93, 4.05 - number // 4 * 2.1, [C], bar=0.18, first=number)
    axes.text(0.3, 0.13, "Bars: the computed tokens. Squares: a line\na token, in colour the tokens it sees.", size=9)
    return figure


def _seen(tokens: int) -> int:
    """Number of attention scores of a causal triangle."""
    return tokens * (tokens + 1) // 2


def _behind(tokens: int) -> int:
    """Number of attention scores of a completion behind the prompt."""
    return tokens * P + _seen(tokens)


def _mask(axes: Axes, left: float, top: float, lengths: Sequence[int], *, bar: float, first: int = 0) -> None:
    """Draw a bar of prompt and completions, and below it the tokens that each token sees."""
    size = (P + sum(lengths)) * SCALE
    _block(axes, left, top - size, size, size, HIDDEN)
    _segment(axes, left, top + 0.05, P, "prompt", PROMPT, bar)
    _triangle(axes, left, top, P, PROMPT)
    start = P
    for number, length in enumerate(lengths, start=first):
        colour, across, down = COMPLETIONS[number % 2], left + start * SCALE, top - start * SCALE
        _segment(axes, across, top + 0.05, length, f"c{number + 1}", colour, bar)
        _block(axes, left, down - length * SCALE, P * SCALE, length * SCALE, PROMPT, lw=0.6)
        _triangle(axes, across, down, length, colour)
        start += length


def _segment(axes: Axes, left: float, bottom: float, tokens: int, name: str, colour: str, height: float) -> None:
    _block(axes, left, bottom, tokens * SCALE, height, colour, lw=0.6)
    look = {"ha": "center", "va": "center", "color": PAPER if colour == PROMPT else INK}
    axes.text(left + tokens * SCALE / 2, bottom + height / 2 - 0.01, name, size=8, **look)


def _triangle(axes: Axes, left: float, top: float, tokens: int, colour: str) -> None:
    size = tokens * SCALE
    axes.add_patch(Polygon([(left, top), (left, top - size), (left + size, top - size)], color=colour, lw=0))


def _block(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str, lw: float = 0) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=PAPER, lw=lw))


def _canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _rounded(axes: Axes, left: float, bottom: float, width: float, height: float, face: str, edge: str) -> None:
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, facecolor=face, edgecolor=edge))


def _arrow(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw an arrow through corners; its head is on the last stretch."""
    axes.plot(*zip(*points[:-1], strict=True), color=EDGE, lw=1.4, solid_joinstyle="round")
    axes.add_patch(
        FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=13, color=EDGE, lw=1.4, shrinkA=0)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
