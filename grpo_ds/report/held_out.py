"""held_out.json: every held-out question with the answer before and after training and what each earned, and the
grades of both; how people, the report and the model card compare them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_ds.report.reading import HELD_OUT_FILE
from grpo_ds.run_folder.checkpoints import write_whole
from grpo_ds.task.grading import Evaluation, mcnemar
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards

Score = Callable[[Sequence[str], Sequence[Question]], Rewards]


def write_held_out(
    folder: Path, questions: Sequence[Question], evaluations: dict[str, Evaluation], score: Score | None
) -> None:
    """evaluations: by when they were made: before, after. score: what says what an answer earned, None: not asked."""
    lines: list[dict[str, Any]] = [{"id": q.id, "question": q.text, "label": q.label} for q in questions]
    for when, evaluation in evaluations.items():
        for line, text, answer in zip(lines, evaluation.texts, evaluation.answers, strict=True):
            line[when] = {"text": text, "answer": answer}
        if score:
            earned = score(evaluation.texts, questions)
            for row, line in enumerate(lines):
                by_name = {name: values[row] for name, values in earned.by_name.items()}
                line[when] |= {"reward": earned.total[row], "rewards": by_name}
    whole = {**grades(questions, evaluations), "questions": lines}
    write_whole(folder / HELD_OUT_FILE, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def grades(questions: Sequence[Question], evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Grades by when, and once there are both whether they differ (McNemar)."""
    found: dict[str, Any] = {when: asdict(evaluation.grades) for when, evaluation in evaluations.items()}
    if len(evaluations) > 1:
        found["mcnemar"] = mcnemar(*(right(evaluation, questions) for evaluation in evaluations.values()))
    return found


def right(evaluation: Evaluation, questions: Sequence[Question]) -> list[bool]:
    """Which of the questions were answered right."""
    return [answer == q.label for answer, q in zip(evaluation.answers, questions, strict=True)]
