"""Lean: one label is given more often, or is more probable, than the questions have it."""

from dataclasses import dataclass

from grpo_ds.report.evidence import Evidence
from grpo_ds.report.run_files import as_label
from grpo_ds.task.grading import FEWEST_TO_COLLAPSE
from grpo_ds.task.statistics import wilson_interval

LEAN = 0.25  # share of answers beyond the label's share of the questions, or of mean p(label): half-way to one label


@dataclass(frozen=True, slots=True)
class Lean:
    """A label that the answers lean to.

    Example:
        >>> print(Lean("no", 0.76, 0.5, by_p=True))
        mean probability 76%, right for 50% of the questions
    """

    label: str
    share: float  # its mean probability, or its share of the answers
    of_questions: float  # its share of the questions
    by_p: bool  # by the mean probability

    def __str__(self) -> str:
        measured = f"mean probability {self.share:.0%}" if self.by_p else f"{self.share:.0%} of the answers"
        return f"{measured}, right for {self.of_questions:.0%} of the questions"


def lean_of(known: Evidence, when: str) -> Lean | None:
    """Return the lean of the answers: by the mean p(label) if that shows one, else by the answers given."""
    shares, p, answers = known.class_shares(), known.by_label(when, "lean"), known.by_label(when, "predicted")
    given = sum(answers.values())
    if p and shares:
        label = max(p, key=lambda label: p[label] - shares.get(label, 0))
        if p[label] - shares.get(label, 0) >= LEAN:
            return Lean(as_label(label), p[label], shares.get(label, 0), by_p=True)
    if not given or not (shares or known.grades(when).get("collapsed")):
        return None
    label = max(answers, key=lambda label: answers[label] / given - shares.get(label, 0))
    share, of_questions = answers[label] / given, shares.get(label, 0)
    collapsed = known.grades(when).get("collapsed") is True and given >= FEWEST_TO_COLLAPSE
    beyond_chance = wilson_interval(round(share * given), round(given))[0] > of_questions
    leans = beyond_chance and given >= FEWEST_TO_COLLAPSE and share - of_questions >= LEAN
    return Lean(as_label(label), share, of_questions, by_p=False) if collapsed or leans else None
