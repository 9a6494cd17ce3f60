"""Figures of an evaluation as rows of a table and as a line: in the console, on the page and on the model card.

They come from files as well, of older versions too, so any but the grades may be missing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]  # Evaluation.figures(), or the same read from a file
Row = tuple[str, Callable[[Figures], str]]  # name, and the cell of one evaluation
UNKNOWN = "-"


def grade_rows(sides: Sequence[Figures]) -> list[Row]:
    """Return the rows of the greedy answers' grades."""
    return [
        ("accuracy", lambda f: f"{f['accuracy']:.1%}"),
        ("  95 % interval", lambda f: "{:.1%} to {:.1%}".format(*f["accuracy_interval"])),
        ("macro-F1", lambda f: f"{f['macro_f1']:.3f}"),
        *[(f"recall {label}", lambda f, label=label: f"{f['recall'][label]:.1%}") for label in sides[0]["recall"]],
        ("well-formed", lambda f: f"{f['well_formed']:.1%}"),
    ]


def confidence_rows(sides: Sequence[Figures]) -> list[Row]:
    """Return the rows of label probabilities and votes, without those that no side has."""
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("mean_p_right", "mean p(right)", "{:.3f}".format),
        ("mean_p_right_interval", "p(right), 95 % interval", _interval),
        ("mean_p_right_empty", "p(right), empty reasoning", "{:.3f}".format),
        ("reasoning_gain", "reasoning gain", "{:+.3f}".format),
        ("reasoned", "reasoning in form", "{:.1%}".format),
        ("lean", f"lean{_classes(sides)}", _shares),
        ("auc", "AUC", "{:.3f}".format),
        ("auc_interval", "AUC, 95 % interval", _interval),
        ("calibration_error", "calibration error", "{:.3f}".format),
        ("misled_accuracy", "accuracy if misled", "{:.1%}".format),
        ("vote_accuracy", f"accuracy of {_samples(sides)} votes", "{:.1%}".format),
    ]
    known = [row for row in rows if any(side.get(row[0]) is not None for side in sides)]
    return [(title, _cell(key, show)) for key, title, show in known]


def change_line(compared: Figures) -> str:
    """Say how p(right) changed. compared: `held_out.compared`."""
    low, high = compared["p_right_change_interval"]
    change, p = compared["p_right_change"], compared["p_right_p_value"]
    test = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"Change of mean p(right): {change:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, paired test {test}"


def _cell(key: str, show: Callable[[Any], str]) -> Callable[[Figures], str]:
    return lambda figures: UNKNOWN if figures.get(key) is None else show(figures[key])


def _interval(bounds: Sequence[float]) -> str:
    return "{:.3f} to {:.3f}".format(*bounds)


def _shares(by_label: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {share:.0%}" for label, share in by_label.items())


def _classes(sides: Sequence[Figures]) -> str:
    """Return the shares of the classes, with which a lean is compared."""
    shares = next((side["class_shares"] for side in sides if side.get("class_shares")), None)
    return f" (classes: {_shares(shares)})" if shares else ""


def _samples(sides: Sequence[Figures]) -> int:
    return next((side["samples"] for side in sides if side.get("samples")), 0)
