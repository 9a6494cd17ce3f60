"""held_out.json: the held-out questions with their answers before and after training, the rewards and the grades.

The console, the report page and the model card compare these answers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_ds.run_folder.files import HELD_OUT_FILE
from grpo_ds.system.files import write_whole
from grpo_ds.task.grading import Evaluation, mcnemar
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards

Score = Callable[[Sequence[str], Sequence[Question]], Rewards]


def write_held_out(
    folder: Path, questions: Sequence[Question], evaluations: dict[str, Evaluation], score: Score | None
) -> None:
    """Write held_out.json. evaluations: "before" and, once made, "after". score: computes rewards; None: leave out."""
    lines: list[dict[str, Any]] = [{"id": q.id, "question": q.text, "label": q.label} for q in questions]
    for when, evaluation in evaluations.items():
        for line, text, answer in zip(lines, evaluation.texts, evaluation.answers, strict=True):
            line[when] = {"text": text, "answer": answer}
        if score:
            earned = score(evaluation.texts, questions)
            for row, line in enumerate(lines):
                by_name = {name: values[row] for name, values in earned.by_name.items()}
                line[when] |= {"reward": earned.total[row], "rewards": by_name}
    content = {**grades(questions, evaluations), "questions": lines}
    write_whole(folder / HELD_OUT_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def grades(questions: Sequence[Question], evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Return the grades before and after; if both exist, also McNemar's p that they do not differ."""
    report: dict[str, Any] = {when: asdict(evaluation.grades) for when, evaluation in evaluations.items()}
    if len(evaluations) > 1:
        report["mcnemar"] = mcnemar(*(answered_right(evaluation, questions) for evaluation in evaluations.values()))
    return report


def answered_right(evaluation: Evaluation, questions: Sequence[Question]) -> list[bool]:
    """Return a bool for each question: True if its answer is right."""
    return [answer == q.label for answer, q in zip(evaluation.answers, questions, strict=True)]
