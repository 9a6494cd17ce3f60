"""Figures of lax parsers (task/lax.py) beside the strict ones: lines for the console, a block for JSON."""

from collections.abc import Mapping
from typing import Any

from grpo_ds.task.grading import ClassGrades, Grades
from grpo_ds.task.lax import OTHER_PARSERS, PARSERS

HEADING = "Under the strict parser, and under lax ones, for comparison with figures that were made so:"
STRICT = "one answer, in the required form"


def lax_lines(strict: Grades, lax: Mapping[str, Grades]) -> str:
    """Return a line for the strict parser and one for each lax one."""
    takes = {**PARSERS, **OTHER_PARSERS}
    rows = [("strict", strict, STRICT), *((name, grades, takes[name]) for name, grades in lax.items())]
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"  {name:{width}}  accuracy {grades.accuracy:6.1%}  {_macro_f1(grades)}"
        f"answered {grades.well_formed:6.1%}  ({read})"
        for name, grades, read in rows
    ]
    return "\n".join([HEADING, *lines])


def lax_block(lax: Mapping[str, Grades]) -> dict[str, dict[str, Any]]:
    """Return the figures of each lax parser that can differ from the strict ones."""
    return {
        name: {
            "accuracy": grades.accuracy,
            "accuracy_interval": grades.accuracy_interval,
            "answered": grades.well_formed,
            **_of_classes(grades),
        }
        for name, grades in lax.items()
    }


def _macro_f1(grades: Grades) -> str:
    return f"macro-F1 {grades.macro_f1:.3f}  " if isinstance(grades, ClassGrades) else ""


def _of_classes(grades: Grades) -> dict[str, Any]:
    if not isinstance(grades, ClassGrades):
        return {}
    return {"macro_f1": grades.macro_f1, "recall": grades.recall, "predicted": grades.predicted}
