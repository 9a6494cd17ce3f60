"""Numbers of a run that a verdict rests on, read so that a missing or damaged one is None.

The numbers come from its metrics, from the grades of its held-out answers, from its settings, and from its summary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean
from typing import Any, get_args

from grpo_ds.models.presets import PRESETS
from grpo_ds.report.run_files import JsonObject, RunFiles, as_number, as_object, as_objects
from grpo_ds.settings.config import TrainConfig
from grpo_ds.task.answers import AnswerFormat, AnswerKind

DEFAULTS = {flag.name: flag.default for flag in fields(TrainConfig)}
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence of a run: all that is known of it.

    Example: two steps, no held-out answers, one setting that is not the default
        >>> known = Evidence([{"reward": 0.5, "kl": 0.01}, {"reward": 0.7, "kl": None}], {}, {"beta": 0.1}, {})
        >>> known.late("reward"), known.late("kl"), known.setting("beta"), known.setting("mu")
        (0.7, 0.01, 0.1, 1)
    """

    steps: Sequence[JsonObject]  # metrics.jsonl without its evaluations
    outcome: JsonObject  # held_out.json: "before" and "after", each the grades; the tests; "questions"
    config: JsonObject  # grpo_config.yaml
    summary: JsonObject  # summary.json; {} of a run that has not ended

    @classmethod
    def of(cls, run: RunFiles) -> "Evidence":
        return cls(run.steps, run.held_out, run.config, run.summary)

    def values(self, metric: str) -> list[float]:
        """Values of a metric, without the steps that lack it."""
        return [value for row in self.steps if (value := as_number(row.get(metric))) is not None]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return fmean(values) if values else None

    def early(self, metric: str) -> float | None:
        """Mean over the first quarter of the steps."""
        quarters = self.quarters(metric)
        return quarters[0] if quarters else None

    def late(self, metric: str) -> float | None:
        """Mean over the last quarter of the steps."""
        quarters = self.quarters(metric)
        return quarters[-1] if quarters else None

    def quarters(self, metric: str) -> list[float]:
        """Mean over each quarter of the steps; of fewer than four steps each step, [] without any."""
        values = self.values(metric)
        parts = min(4, len(values))
        bounds = [part * len(values) // parts for part in range(parts + 1)] if parts else []
        return [fmean(values[start:end]) for start, end in pairwise(bounds)]

    def setting(self, name: str) -> Any:
        """The run's value of a flag; the default if it is missing or of another kind."""
        default, value = DEFAULTS[name], self.config.get(name)
        if isinstance(default, bool) or default is None or isinstance(default, str):
            return value if isinstance(value, type(default)) else default
        number = as_number(value)
        return default if number is None else int(number) if isinstance(default, int) else number

    def grade(self, when: str, name: str) -> float | None:
        """A grade of the answers before or after training, such as "accuracy"."""
        return as_number(self.grades(when).get(name))

    def grades(self, when: str) -> JsonObject:
        return as_object(self.outcome.get(when, {}))

    def by_label(self, when: str, name: str) -> dict[str, float]:
        """A grade that has a number for each label, such as "predicted"; {} if it is missing."""
        found = as_object(self.grades(when).get(name) or {})
        return {label: as_number(value) or 0.0 for label, value in found.items()}

    @property
    def count(self) -> int:
        """Number of held-out questions."""
        return int(self.grade(AFTER, "count") or self.grade(BEFORE, "count") or 0)

    @property
    def questions(self) -> list[JsonObject]:
        return as_objects(self.outcome.get("questions", []))

    @property
    def answer_format(self) -> AnswerFormat:
        labels, units = self.setting("labels"), self.config.get("units")
        return AnswerFormat(
            tuple(label.strip() for label in labels.split(",")),
            self.setting("reasoning_tag"),
            self.setting("answer_tag"),
            self.kind,
            tuple(unit.strip() for unit in units.split(",")) if isinstance(units, str) else (),
        )

    @property
    def kind(self) -> AnswerKind:
        """Kind of the answers; labels in a run of an older version."""
        kind = self.setting("answers")
        return kind if kind in get_args(AnswerKind) else "labels"

    def class_shares(self) -> dict[str, float]:
        """Share of each label among the held-out questions; {} if it is not known."""
        if self.kind != "labels":
            return {}
        if shares := self.by_label(AFTER, "class_shares"):
            return shares
        labels = [str(row.get("label")) for row in self.questions]
        return {label: labels.count(label) / len(labels) for label in dict.fromkeys(labels)}

    def reasoning_words(self, when: str) -> float | None:
        """Mean number of words between the reasoning tags of well-formed held-out answers; None without any."""
        answered = [as_object(row[when]) for row in self.questions if when in row]
        split = self.answer_format.split
        words = [len(split(str(it.get("text")))[0].split()) for it in answered if it.get("answer") is not None]
        return fmean(words) if words else None

    @property
    def parameters(self) -> int | None:
        """Number of the model's parameters, from the summary or for a model known by name."""
        known = as_number(self.summary.get("parameters"))
        preset = PRESETS.get(str(self.setting("model")))
        return int(known) if known else preset.parameters if preset else None
