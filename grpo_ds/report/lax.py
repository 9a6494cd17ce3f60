"""Figures of lax parsers (task/lax.py) beside the strict ones: lines for the console, a block for JSON."""

from collections.abc import Mapping
from typing import Any

from grpo_ds.task.grading import Grades
from grpo_ds.task.lax import PARSERS

HEADING = "Under the strict parser, and under lax ones, for comparison with figures that were made so:"
STRICT = "one label, in the required form"


def lax_lines(strict: Grades, lax: Mapping[str, Grades]) -> str:
    """Return a line for the strict parser and one for each lax one."""
    rows = [("strict", strict, STRICT), *((name, grades, PARSERS[name]) for name, grades in lax.items())]
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"  {name:{width}}  accuracy {grades.accuracy:6.1%}  macro-F1 {grades.macro_f1:.3f}  "
        f"answered {grades.well_formed:6.1%}  ({takes})"
        for name, grades, takes in rows
    ]
    return "\n".join([HEADING, *lines])


def lax_block(lax: Mapping[str, Grades]) -> dict[str, dict[str, Any]]:
    """Return the figures of each lax parser that can differ from the strict ones."""
    return {
        name: {
            "accuracy": grades.accuracy,
            "accuracy_interval": grades.accuracy_interval,
            "macro_f1": grades.macro_f1,
            "recall": grades.recall,
            "answered": grades.well_formed,
            "predicted": grades.predicted,
        }
        for name, grades in lax.items()
    }
