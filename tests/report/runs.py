"""Folders as runs leave them, written by the functions that write them in a run; texts and numbers are invented."""

import math
import random
from pathlib import Path

import torch

from grpo_ds.memory.phases import Profiler, Span
from grpo_ds.memory.plan import GIB, PhasePlan, Plan
from grpo_ds.report import environment, held_out, memory_measured
from grpo_ds.report.trackers import JsonLines
from grpo_ds.run_folder.status import RunStatus
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import Evaluation, graded
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards

FORM = AnswerFormat(("yes", "no"), "reasoning", "answer")
SEED = 7


def complete(folder: Path, *, steps: int = 60, asked: int = 40) -> Path:
    """Write a run that is done, with every file that a run can have."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(TrainConfig(model="smollm2-135m", num_steps=steps, learning_rate=2e-5), folder)
    environment.write_environment(folder, ranks=1)
    answered(folder, asked)
    logged(folder, steps)
    remembered(folder, steps)
    RunStatus(folder, max_steps=steps).write("done", step=steps, exit_code=0)
    return folder


def logged(folder: Path, steps: int, **changes: float) -> None:
    """Write metrics.jsonl with an evaluation every 20 steps, and completions.jsonl."""
    lines = JsonLines(folder)
    for step in range(1, steps + 1):
        lines.log(metrics(step, steps) | changes, step=step)
        lines.completions([completion(step, i) for i in range(8)], step=step)
        if step % 20 == 0 and step < steps:
            lines.log(
                {"eval/accuracy": 0.3 + 0.4 * step / steps, "eval/macro_f1": 0.4, "eval/well_formed": 0.9}, step=step
            )
    lines.finish({"steps": steps})


def metrics(step: int, steps: int) -> dict[str, float]:
    noise = random.Random(SEED * step).gauss
    learned = 1 - math.exp(-4 * step / steps)
    right = min(1.0, max(0.0, 0.2 + 0.55 * learned + noise(0, 0.1)))
    seconds = {"sample": 6 + noise(0, 0.8), "reference": 3.4, "update": 10 + noise(0, 1.0), "step": 0.35}
    return {
        "reward": 2 * right + 0.4 * learned,
        "rewards/correctness/mean": 2 * right,
        "rewards/correctness/std": 0.9,
        "rewards/format/mean": 0.4 * learned,
        "rewards/format/std": 0.1,
        "reward_std": 0.4,
        "frac_reward_zero_std": 0.5 * learned,
        "accuracy": right,
        "completions/mean_length": 14 + 24 * (1 - learned) + noise(0, 2),
        "completions/clipped_ratio": 0.6 - 0.6 * learned,
        "kl": 0.003 + 0.25 * learned + abs(noise(0, 0.02)),
        "kl_floor": 0.0031,
        "entropy": 0.6 + 2 * (1 - learned) + noise(0, 0.1),
        "clip_ratio/region_mean": 0.01,
        "grad_norm": 3.0,
        "loss": 0.0,
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "num_tokens": 4000.0 * step,
        "epoch": step / 20,
        "step_time": sum(seconds.values()),
        "tokens_per_second": 20.0,
        "memory/ram_gib": 6.2,
    }


def completion(step: int, i: int) -> dict[str, object]:
    earned = 2.0 if i % 2 else 0.0
    return {
        "question": f"Does early mobilisation shorten the stay in hospital after a hip fracture ({step}, {i // 4})?",
        "label": "yes",
        "completion": f"<reasoning>The trial says so.</reasoning><answer>{'yes' if i % 2 else 'no'}</answer>",
        "reward": earned + 0.4,
        "rewards/correctness": earned,
        "rewards/format": 0.4,
        "advantage": 1.0 if i % 2 else -1.0,
    }


def answered(folder: Path, count: int, *, over: bool = True) -> None:
    """Write held_out.json; over: with the answers after training."""
    draw = random.Random(SEED).random
    questions = [
        Question(
            str(i),
            f"Is treatment {i} better than watchful waiting in adults over sixty?",
            f"In trial {i} both were compared for a year.",
            "yes" if i % 3 else "no",
        )
        for i in range(count)
    ]
    before = ["I think that it may be so." if draw() < 0.6 else said(draw() < 0.5) for _ in questions]
    after = [said(draw() < 0.75 if q.label == "yes" else draw() < 0.3) for q in questions]
    evaluations = {"before": evaluation(before, questions)} | ({"after": evaluation(after, questions)} if over else {})
    held_out.write_held_out(folder, questions, evaluations, earned if over else None)


def said(yes: bool) -> str:
    why = "The group that was treated did better, and the difference is larger than its error."
    return f"<reasoning>{why}</reasoning><answer>{'yes' if yes else 'no'}</answer>"


def evaluation(texts: list[str], questions: list[Question]) -> Evaluation:
    return graded(texts, questions, FORM)


def earned(texts: list[str], questions: list[Question]) -> Rewards:
    right = [2.0 * (FORM.parse(text).answer == q.label) for text, q in zip(texts, questions, strict=True)]
    form = [0.4 * (FORM.parse(text).answer is not None) for text in texts]
    total = [a + b for a, b in zip(right, form, strict=True)]
    return Rewards(total, {"correctness": right, "format": form})


def remembered(folder: Path, steps: int) -> None:
    """Write memory.json of a machine with a card."""
    sizes = {"load": 1.3, "evaluate": 5.9, "sample": 4.1, "reference": 4.6, "update": 6.2, "step": 3.0, "save": 3.1}
    order = ["load", "evaluate", *["sample", "reference", "update", "step"] * steps, "evaluate", "save"]
    gpu, ram = ({name: int(of * GIB * size) for name, size in sizes.items()} for of in (1, 0.9))
    phases = [PhasePlan(name, {"weights": gpu[name]}, {"process": ram[name]}) for name in sizes]
    profiler = Profiler(torch.device("cpu"), Plan(tuple(phases)))
    for i, name in enumerate(order):
        peak = int(sizes[name] * GIB)
        profiler.spans.append(Span(name, 5.0 * i, 4.8, peak, peak // 2, 0, int(peak * 1.1), peak))
    memory_measured.write_memory(profiler, folder)
