"""Where a run's memory goes: a few real steps, preceded by the worst case, each phase's peak beside its plan.

Takes every flag of train.py. Nothing is evaluated and no model is saved; memory.json and memory.svg are written.

    deepspeed launch/profile_memory.py --ds ds_configs/zero2.json --num_steps 2
"""

from grpo_ds.commands.train import make_run, output_folder, reward_functions, settle
from grpo_ds.errors import UsageError
from grpo_ds.task.questions import read_questions, split_questions

STEPS = "2"  # where --num_steps is not given: the first step makes the moments, the second finds them


def main(argv: list[str]) -> None:
    defaults = [] if any(word.startswith("--num_steps") for word in argv) else ["--num_steps", STEPS]
    settled = settle(
        [
            *argv,
            *defaults,
            "--dry_run_worst_case",
            *("--save_steps", "0"),
            *("--eval_steps", "0"),
            *("--report_to", "none"),
        ]
    )
    if settled.resume_from:
        raise UsageError("A profile begins at the first step: leave --resume_from_checkpoint out.")
    config = settled.config
    questions = read_questions(config.data, labels=config.label_names, fields=config.field_names)
    train, _ = split_questions(questions.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    folder = output_folder(config)

    lines = [f"Profiling {config.model} ({settled.choice.why}) under {config.ds}"]
    run = make_run(settled, reward_functions(config, questions), lines, train, [], folder)
    run.trainer.profiler.exact = True
    folder.mkdir(parents=True, exist_ok=True)
    run.train()
    run.report_memory()
    run.status.write("done", exit_code=0)
    run.close()
