#!/usr/bin/env python
"""Where a run's memory goes: a few real steps, preceded by the worst case, each phase's peak beside its plan.

Takes every flag of train.py. Nothing is evaluated and no model is saved; memory.json and memory.svg are written.

    deepspeed launch/profile_memory.py --ds ds_configs/zero2.json --num_steps 2
"""

from train import output_folder, settle

from grpo_ds.errors import run_script
from grpo_ds.task.questions import read_questions, split_questions

STEPS = "2"  # where --num_steps is not given: the first step makes the moments, the second finds them


def main(argv: list[str]) -> None:
    defaults = [] if any(word.startswith("--num_steps") for word in argv) else ["--num_steps", STEPS]
    settled = settle([*argv, *defaults, "--dry_run_worst_case"])
    choice, config = settled.choice, settled.config
    questions = read_questions(config.data, labels=config.label_names)
    train, _ = split_questions(questions.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    folder = output_folder(config)

    from grpo_ds import world
    from grpo_ds.report import memory
    from grpo_ds.report.console import Console
    from grpo_ds.task.rewards import reward_functions
    from grpo_ds.trainer import Trainer

    here = world.start(needs_gpu=choice.needs_gpu)
    console = Console(speaks=here.is_first)
    console.line(f"Profiling {config.model} ({choice.why}) under {config.ds}")
    rewards = reward_functions(
        labels=config.label_names,
        correctness_reward=config.correctness_reward,
        format_reward=config.format_reward,
    )
    trainer = Trainer(config, settled.job.ds, here, console, rewards, settled.plan)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train(train, folder)
    console.memory(trainer.profiler)
    if here.is_first:
        console.line("Written: {} and {}".format(*memory.write(trainer.profiler, folder)))
    world.stop()


if __name__ == "__main__":
    run_script(main)
