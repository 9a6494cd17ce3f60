"""Measure a run's memory: the worst case, then a few real steps; print the peak of each phase beside its plan.

Takes every flag of `grpo-ds train`; num_steps is used only if typed, for that of a --config file is meant for training.
Evaluates nothing and saves no model; writes memory.json and memory.svg.

    deepspeed launch/profile_memory.py --ds ds_configs/zero2.json --num_steps 2
"""

from pathlib import Path

from grpo_ds.commands.settle import settle, split_for_training
from grpo_ds.commands.train import ending_cleanly, make_run, output_folder, reward_functions
from grpo_ds.errors import UsageError
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.system.streams import output_is_optional
from grpo_ds.task.questions import read_questions

STEPS = "2"  # if --num_steps is not typed: the first step creates the moments, the second reuses them


def main(argv: list[str]) -> None:
    with ending_cleanly():
        profile_from(argv)


def profile_from(argv: list[str]) -> None:
    defaults = [] if any(word.startswith("--num_steps") for word in argv) else ["--num_steps", STEPS]
    fixed = ["--dry_run_worst_case", "--save_steps", "0", "--eval_steps", "0", "--report_to", "none"]
    settled = settle([*argv, *defaults, *fixed], about=__doc__)
    if settled.resume_from:
        raise UsageError("A profile starts at the first step: leave --resume_from_checkpoint out.")
    output_is_optional()
    config = settled.config
    questions = read_questions(config.data, **config.reading)
    train, _ = split_for_training(config, questions, read_trained_on(Path(config.model)) or frozenset())
    rewards, folder = reward_functions(config, questions), output_folder(config)

    steps = f"the worst case and {config.total_steps} steps, or as many as --num_steps says"
    lines = [*settled.warnings, f"Profiling {config.model} ({settled.choice.why}) under {config.ds}: {steps}"]
    run = make_run(settled, rewards, lines, train, [], folder, exact_memory=True)
    run.train()
    run.reports.memory()
    run.status.write("done", exit_code=0)
    run.close()
