"""Figures of an evaluation as rows of a table and as a line: in the console, on the page and on the model card.

They come from files as well, of older versions too, so any but the grades may be missing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_ds.task.grading import FEWEST_TO_COMPARE, ClassGrades, Evaluation

Figures = Mapping[str, Any]  # Evaluation.figures(), or the same read from a file
Row = tuple[str, Callable[[Figures], str]]  # name, and the cell of one evaluation
UNKNOWN = "-"
CHANGES = {"p_right": "mean p(right)", "reward": "mean reward"}  # as in summary.json -> its name


def grade_line(evaluation: Evaluation) -> str:
    """Return the grades of an evaluation in a line."""
    grades, known, rewards = evaluation.grades, evaluation.confidence, evaluation.earned
    if rewards:
        low, high = rewards.mean_reward_interval
        return f"mean reward {rewards.mean_reward:.3f} (95 % interval {low:.3f} to {high:.3f}) of {rewards.count}"
    if not grades:
        return "no answer is right, and no reward is known"
    p_right = f", p(right) {known.mean_p_right:.3f}" if known else ""
    macro_f1, remarks = "", []
    if isinstance(grades, ClassGrades):
        macro_f1 = f", macro-F1 {grades.macro_f1:.3f}"
        remarks = [f"majority baseline: {grades.majority_baseline:.1%}"]
    if grades.count < FEWEST_TO_COMPARE:
        low, high = grades.accuracy_interval
        remarks.append(f"95 % interval {low:.0%} to {high:.0%}: too few")
    said = f" ({'; '.join(remarks)})" if remarks else ""
    form = f", well-formed {grades.well_formed:.1%} of {grades.count}{said}"
    return f"accuracy {grades.accuracy:.1%}{p_right}{macro_f1}{form}"


def grade_rows(sides: Sequence[Figures]) -> list[Row]:
    """Return the rows of the greedy answers' grades, those that fit the kind of answer."""
    first, rows = sides[0], list[Row]()
    if "accuracy" in first:
        rows.append(("accuracy", lambda f: f"{f['accuracy']:.1%}"))
        rows.append(("  95 % interval", lambda f: "{:.1%} to {:.1%}".format(*f["accuracy_interval"])))
    if "macro_f1" in first:
        rows.append(("macro-F1", lambda f: f"{f['macro_f1']:.3f}"))
    rows += [(f"recall {label}", _share("recall", label)) for label in first.get("recall", ())]
    if "well_formed" in first:
        rows.append(("well-formed", lambda f: f"{f['well_formed']:.1%}"))
    return rows


def reward_rows(sides: Sequence[Figures]) -> list[Row]:
    """Return the rows of rewards, if they are the grade."""
    if "mean_reward" not in sides[0]:
        return []
    return [
        ("mean reward", lambda f: f"{f['mean_reward']:.3f}"),
        ("  95 % interval", lambda f: _interval(f["mean_reward_interval"])),
        *[(f"reward {name}", _mean("mean_rewards", name)) for name in sides[0]["mean_rewards"]],
    ]


def _share(figure: str, key: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures[figure][key]:.1%}"


def _mean(figure: str, key: str) -> Callable[[Figures], str]:
    def show(figures: Figures) -> str:
        value = figures[figure].get(key)
        return UNKNOWN if value is None else f"{value:.3f}"

    return show


def confidence_rows(sides: Sequence[Figures]) -> list[Row]:
    """Return the rows of label probabilities and votes, without those that no side has."""
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("mean_p_right", "mean p(right)", "{:.3f}".format),
        ("mean_p_right_interval", "p(right), 95 % interval", _interval),
        ("mean_p_right_empty", "p(right), empty reasoning", "{:.3f}".format),
        ("reasoning_gain", "reasoning gain", "{:+.3f}".format),
        ("reasoned", "well-formed up to the answer", "{:.1%}".format),
        ("lean", f"lean, mean p{_classes(sides)}", _shares),
        ("auc", "AUC", "{:.3f}".format),
        ("auc_interval", "AUC, 95 % interval", _interval),
        ("calibration_error", "calibration error", "{:.3f}".format),
        ("misled_accuracy", "accuracy if misled", "{:.1%}".format),
        ("vote_accuracy", f"accuracy of {_samples(sides)} votes", "{:.1%}".format),
    ]
    known = [row for row in rows if any(side.get(row[0]) is not None for side in sides)]
    return [(title, _cell(key, show)) for key, title, show in known]


def change_lines(figures: Figures) -> list[str]:
    """Return the majority baseline with McNemar's p, and how p(right) or the reward changed; what is known of these.

    figures: of one side, with `held_out.paired_tests`.
    """
    tests = []
    if (baseline := figures.get("majority_baseline")) is not None:
        tests.append(f"Majority baseline (always the most common label): {baseline:.1%}.")
    if (p := figures.get("mcnemar")) is not None:
        tests.append(f"McNemar p = {p:.3f}")
    return [*(["  ".join(tests)] if tests else []), *mean_change_lines(figures)]


def mean_change_lines(compared: Figures) -> list[str]:
    """Say how p(right) and the reward changed, if they are known. compared: `held_out.paired_tests`."""
    known = [(key, name) for key, name in CHANGES.items() if f"{key}_change" in compared]
    return [_change_line(compared, key, name) for key, name in known]


def _change_line(compared: Figures, key: str, name: str) -> str:
    low, high = compared[f"{key}_change_interval"]
    change, p = compared[f"{key}_change"], compared[f"{key}_p_value"]
    test = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"Change of {name}: {change:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, paired test {test}"


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
