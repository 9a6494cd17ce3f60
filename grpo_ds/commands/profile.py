"""Measure a run's memory: the worst case, then a few real steps; print the peak of each phase beside its plan.

Takes every flag of `grpo-ds train`. Evaluates nothing and saves no model; writes memory.json and memory.svg.

    deepspeed launch/profile_memory.py --ds ds_configs/zero2.json --num_steps 2
"""

from grpo_ds.commands.settle import settle
from grpo_ds.commands.train import make_run, output_folder, reward_functions
from grpo_ds.errors import UsageError
from grpo_ds.task.questions import read_questions, split_questions

STEPS = "2"  # if --num_steps is not given: the first step creates the moments, the second reuses them


def main(argv: list[str]) -> None:
    defaults = [] if any(word.startswith("--num_steps") for word in argv) else ["--num_steps", STEPS]
    fixed = ["--dry_run_worst_case", "--save_steps", "0", "--eval_steps", "0", "--report_to", "none"]
    settled = settle([*argv, *defaults, *fixed], about=__doc__)
    if settled.resume_from:
        raise UsageError("A profile starts at the first step: leave --resume_from_checkpoint out.")
    config = settled.config
    questions = read_questions(config.data, labels=config.label_names, fields=config.field_names)
    train, _ = split_questions(questions.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    folder = output_folder(config)

    lines = [*settled.warnings, f"Profiling {config.model} ({settled.choice.why}) under {config.ds}"]
    run = make_run(settled, reward_functions(config, questions), lines, train, [], folder, exact_memory=True)
    folder.mkdir(parents=True, exist_ok=True)
    run.train()
    run.reports.memory()
    run.status.write("done", exit_code=0)
    run.close()
