"""Held-out figures of runs that differ in their seed alone: summary.json and report.md of the folder above them.

A single run of a small model may end better or worse than the recipe by luck; the median and the range of several say
what the recipe does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from grpo_ds.report.figures import CHANGES
from grpo_ds.report.markdown import table
from grpo_ds.report.run_files import as_number
from grpo_ds.run_folder.files import SEEDS_REPORT_FILE, SUMMARY_FILE
from grpo_ds.system.files import write_whole

FIGURES = {  # as in the summary of a run -> its name
    "accuracy": "accuracy",
    "mean_p_right": "mean p(right)",
    "auc": "AUC",
    "macro_f1": "macro-F1",
    "well_formed": "well-formed",
    "reasoning_gain": "reasoning gain",
    "calibration_error": "calibration error",
    "vote_accuracy": "accuracy of votes",
    "mean_reward": "mean reward",
}
CHANGE_NAMES = {f"{key}_change": name for key, name in CHANGES.items()}
WHEN = ("before", "after")


def write_seeds(folder: Path, summaries: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Write both files; return the lines for the console. summaries: seed -> summary.json of its run."""
    found = spread(summaries)
    write_whole(folder / SUMMARY_FILE, json.dumps(found, indent=1) + "\n")
    lines = spread_lines(found)
    write_whole(folder / SEEDS_REPORT_FILE, "\n".join([f"# {lines[0]}", "", _table(found), "", *_notes(found)]) + "\n")
    return lines


def spread(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return median, lowest, highest and all values of each figure that every run has.

    Example:
        spread({0: summary, 1: other})["after"]["accuracy"]
        # {"median": 0.6, "lowest": 0.55, "highest": 0.65, "values": [0.65, 0.55]}, in the order of the seeds
    """
    runs = [summaries[seed] for seed in sorted(summaries)]
    found: dict[str, Any] = {"seeds": sorted(summaries)}
    for when in WHEN:
        found[when] = {name: it for name in FIGURES if (it := _spread([run.get(when, {}).get(name) for run in runs]))}
    changes = {name: _spread([run.get(name) for run in runs]) for name in CHANGE_NAMES}
    return found | {name: change for name, change in changes.items() if change}


def spread_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a heading, and a line for each figure: its median and range before and after."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [f"Held-out figures of {len(found['seeds'])} seeds ({seeds}): median (lowest to highest)"]
    for name, title in FIGURES.items():
        sides = [f"{when} {_shown(found[when][name])}" for when in WHEN if name in found[when]]
        lines += [f"  {title}: {', '.join(sides)}"] if sides else []
    known = [(name, title) for name, title in CHANGE_NAMES.items() if name in found]
    return [*lines, *(f"  change of {title}: {_shown(found[name], sign='+')}" for name, title in known)]


def _spread(values: Sequence[Any]) -> dict[str, Any] | None:
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if not numbers or len(numbers) < len(values):
        return None
    return {"median": median(numbers), "lowest": min(numbers), "highest": max(numbers), "values": numbers}


def _shown(of: Mapping[str, Any], sign: str = "") -> str:
    return f"{of['median']:{sign}.3f} ({of['lowest']:{sign}.3f} to {of['highest']:{sign}.3f})"


def _table(found: Mapping[str, Any]) -> str:
    rows = [
        (FIGURES[name], when, *(f"{of[key]:.3f}" for key in ("median", "lowest", "highest")), *_three(of["values"]))
        for name in FIGURES
        for when in WHEN
        if (of := found[when].get(name))
    ]
    return table(("", "", "median", "lowest", "highest", *(f"seed {seed}" for seed in found["seeds"])), rows)


def _three(values: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _notes(found: Mapping[str, Any]) -> list[str]:
    folders = ", ".join(f"`seed-{seed}`" for seed in found["seeds"])
    return [
        f"Each of {folders} is an ordinary run, with its own report. A seed decides the split as well, so the held-out",
        "questions differ; the range holds both kinds of chance.",
    ]
