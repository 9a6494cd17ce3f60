"""held_out.json: the held-out questions with their answers before and after training, the rewards and the grades.

The console, the report page and the model card compare these answers.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_ds.run_folder.files import HELD_OUT_FILE
from grpo_ds.system.files import write_whole
from grpo_ds.task.answer_probs import compare_p_right, p_right
from grpo_ds.task.earned import compare_rewards
from grpo_ds.task.grading import Evaluation, mcnemar
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards

Score = Callable[[Sequence[str], Sequence[Question]], Rewards]


def write_held_out(
    folder: Path, questions: Sequence[Question], evaluations: dict[str, Evaluation], score: Score | None
) -> None:
    """Write held_out.json. evaluations: "before" and, once made, "after".

    score: computes rewards that an evaluation does not have; None: leave them out.
    """
    lines: list[dict[str, Any]] = [
        {"id": q.id, "question": q.text, **({"context": q.context} if q.context else {}), "label": q.label}
        for q in questions
    ]
    for when, evaluation in evaluations.items():
        for i, line in enumerate(lines):
            line[when] = {"text": evaluation.texts[i], "answer": evaluation.answers[i], **_more(evaluation, i)}
        if earned := evaluation.rewards or (score and score(evaluation.texts, questions)):
            for row, line in enumerate(lines):
                by_name = {name: values[row] for name, values in earned.by_name.items()}
                line[when] |= {"reward": earned.total[row], "rewards": by_name}
    content = {**grades(questions, evaluations), "questions": lines}
    write_whole(folder / HELD_OUT_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def grades(questions: Sequence[Question], evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Return the figures before and after; if both exist, also the paired tests that fit."""
    report: dict[str, Any] = {when: evaluation.figures() for when, evaluation in evaluations.items()}
    if len(evaluations) > 1:
        report |= paired_tests(questions, *evaluations.values())
    return report


def paired_tests(questions: Sequence[Question], before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return McNemar's p, and the change of p(right) or of the reward with its interval and p-value.

    What is not known on one side is left out.
    """
    found: dict[str, Any] = {}
    if before.right and after.right:
        found["mcnemar"] = mcnemar(before.right, after.right)
    if before.confidence and after.confidence:
        labels = tuple(after.confidence.lean)
        found |= compare_p_right(*(p_right(side.probs or [], questions, labels=labels) for side in (before, after)))
    if before.rewards and after.rewards:
        found |= compare_rewards(before.rewards.total, after.rewards.total)
    return found


def _more(evaluation: Evaluation, i: int) -> dict[str, Any]:
    """Return if the answer at index i is right, the rule that it breaks, its label probabilities and sampled answers.

    What does not apply or is not known is left out.
    """
    more: dict[str, Any] = {"right": evaluation.right[i]} if evaluation.right else {}
    if evaluation.probs and evaluation.confidence:
        probs, labels = evaluation.probs[i], evaluation.confidence.lean
        more["p"] = dict(zip(labels, probs.answer, strict=True))
        more["p_empty"] = dict(zip(labels, probs.empty, strict=True))
        more["reasoned"] = probs.reasoned is not None
        if probs.misled:
            more["p_misled"] = dict(zip(labels, probs.misled, strict=True))
    if evaluation.broken and evaluation.broken[i]:
        more["broken_rule"] = evaluation.broken[i]
    if evaluation.sampled:
        more["sampled"] = evaluation.sampled[i]
    return more
