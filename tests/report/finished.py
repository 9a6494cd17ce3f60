"""The folder of a complete run, without its model, written by the functions that write it in a run."""

import json
from dataclasses import asdict
from pathlib import Path

from grpo_ds.memory.phases import PhaseUse
from grpo_ds.report import environment, held_out
from grpo_ds.report.trackers import write_summary
from grpo_ds.run_folder.files import MEMORY_FILE
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config
from grpo_ds.task.grading import Evaluation, grade
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards

GIB = 2**30
ANSWERS = {"before": ["yes", None, "no", "yes", "yes", "no"], "after": ["yes", "no", "no", "yes", "yes", "yes"]}
TEXT = "<reasoning>a | b</reasoning><answer>{}</answer>"


def finished(folder: Path, *, answers: dict[str, list[str | None]] = ANSWERS, **flags) -> Path:
    """Six questions, yes and no in turn; held_out.json, memory.json, environment.json, grpo_config.yaml, summary."""
    folder.mkdir(parents=True)
    config = TrainConfig(**{"data": "quiz.json", "model": "qwen2.5-0.5b", **flags})
    write_config(config, folder)
    environment.write_environment(folder, ranks=1)
    labels = config.label_names
    questions = [Question(str(n), f"Is {n} | even?", "", labels[n % 2]) for n in range(6)]
    evaluations = {when: evaluated(found, questions, labels) for when, found in answers.items()}
    held_out.write_held_out(folder, questions, evaluations, earned)
    use = PhaseUse("update", 9.0, ram_peak=5 * GIB, pinned=0, gpu_peak=0, gpu_reserved=0)
    planned = {"update": {"gpu": {}, "ram": {"weights": GIB, "gradients": 3 * GIB}}}
    (folder / MEMORY_FILE).write_text(json.dumps({"measured": [asdict(use)], "planned": planned, "spans": []}))
    counts = {"train": 40, "held_out": 6}
    write_summary(folder, {"steps": 7, **held_out.grades(questions, evaluations), "questions": counts})
    return folder


def evaluated(answers, questions, labels):
    right = [answer == question.label for answer, question in zip(answers, questions, strict=True)]
    return Evaluation([TEXT.format(a) for a in answers], answers, grade(answers, questions, labels=labels), right)


def earned(texts, questions):
    right = [2.0 * (f"<answer>{q.label}<" in text) for text, q in zip(texts, questions, strict=True)]
    return Rewards(right, {"correctness": right})
