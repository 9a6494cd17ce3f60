#!/usr/bin/env python
"""Fine-tune a language model by GRPO on yes/no questions, with DeepSpeed ZeRO-2 and CPU offload.

Arguments, data and the DeepSpeed JSON are checked before anything heavy is loaded or anything is written.
"""

import os
import time
from pathlib import Path

from grpo_ds.config import TrainConfig, parse
from grpo_ds.ds_config import DsConfig, DsSizes, resolve_ds_config
from grpo_ds.errors import UsageError, run_script
from grpo_ds.machine import cpu_has_bf16, gpu_memory_gib, ram_gib
from grpo_ds.models.presets import Choice, choose_model
from grpo_ds.report.trackers import check_trackers
from grpo_ds.task.questions import QuestionSet, read_questions, split_questions


def main(argv: list[str]) -> None:
    choice, config, ds = settle(argv)
    questions = read_questions(config.data, labels=config.label_names)
    train, held_out = split_questions(questions.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    held_out = held_out[: config.eval_limit]
    folder = output_folder(config)
    check_trackers(config.report_to)

    from grpo_ds import world  # from here on heavy libraries are loaded
    from grpo_ds.report.console import Console
    from grpo_ds.task.rewards import reward_functions
    from grpo_ds.trainer import Trainer

    here = world.start(needs_gpu=choice.needs_gpu)
    console = Console(speaks=here.is_first)
    for line in first_lines(choice, config, ds, questions, len(train), len(held_out)):
        console.line(line)
    rewards = reward_functions(
        labels=config.label_names,
        correctness_reward=config.correctness_reward,
        format_reward=config.format_reward,
    )
    outcome = Trainer(config, ds, here, console, rewards).run(train, held_out, folder)
    console.before_and_after(outcome.before, outcome.after, held_out)
    console.line(
        "Mean reward: {:.2f} in the first quarter of the steps, {:.2f} in the last.".format(*outcome.quarters())
    )
    console.line(f"Model and metrics.jsonl: {folder}\nAsk it: python launch/ask.py --model {folder} --question ...")
    world.stop()


def settle(argv: list[str]) -> tuple[Choice, TrainConfig, DsConfig]:
    """Flags, the model they mean, its recipe, and the DeepSpeed JSON filled from them."""
    asked = parse(TrainConfig, argv, about=__doc__)
    gpu_gib = gpu_memory_gib()
    choice = choose_model(asked.config.model, gpu_gib=gpu_gib, ram_gib=ram_gib())
    config = parse(TrainConfig, [*argv, "--model", choice.model], about=__doc__, recipe=choice.recipe).config
    sizes = DsSizes(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=0,
        total_steps=config.total_steps * config.mu,
        micro_batch_size=config.batch_size * config.num_generations,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        bf16=gpu_gib is not None or cpu_has_bf16(),
    )
    return choice, config, resolve_ds_config(config.ds, fill=sizes, explicit=asked.typed)


def output_folder(config: TrainConfig) -> Path:
    """Where the run is written; one that holds anything is never written over."""
    named = f"{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.output_dir) if config.output_dir else Path("outputs") / named
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"--output_dir {folder} already holds files, and a run is never written over.\n"
            "Name another folder, or remove this one."
        )
    return folder


def first_lines(
    choice: Choice, config: TrainConfig, ds: DsConfig, questions: QuestionSet, train: int, held_out: int
) -> list[str]:
    """What was chosen and why, before the wait for the model."""
    left_out = ", ".join(f"{count} {label!r} left out" for label, count in questions.left_out.items())
    per_step = f"{config.batch_size} questions x {config.num_generations} completions of at most"
    precision = "bf16" if ds.bf16 else "fp32, as bf16 is off in the JSON or not native to this CPU"
    return [
        f"Model: {config.model} ({choice.why}), in {precision}",
        f"Data: {questions.source}{f' ({left_out})' if left_out else ''}; {train} to train on, {held_out} held out",
        f"Plan: {config.total_steps} steps of {per_step} {config.max_completion_length} tokens; "
        f"learning rate {ds.learning_rate:g}, beta {config.beta:g}, seed {config.seed}",
    ]


if __name__ == "__main__":
    run_script(main)
