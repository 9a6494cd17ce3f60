"""Fine-tune a language model by GRPO on questions with a known answer, with DeepSpeed ZeRO-2 and CPU offload.

Arguments, data and the DeepSpeed JSON are checked before anything heavy is loaded or anything is written.
"""

import os
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_ds.commands.first_lines import first_lines
from grpo_ds.commands.planned import print_plan
from grpo_ds.commands.seeds import folder_of_seeds, train_seeds
from grpo_ds.commands.settle import (
    Settled,
    ranks,
    settle_parsed,
    split_for_training,
    subject_of,
    tried,
    with_epochs,
)
from grpo_ds.errors import CheckpointError, UsageError
from grpo_ds.memory.plan import GIB
from grpo_ds.models.base_weights import base_hash
from grpo_ds.report.trackers import check_trackers
from grpo_ds.run_folder.files import MERGED
from grpo_ds.run_folder.inputs import BASE, PASSED, check_inputs, inputs_of, passed
from grpo_ds.run_folder.lock import FolderTaken, check_writable, lock, lock_new, release
from grpo_ds.run_folder.progress import Progress
from grpo_ds.run_folder.resume import check_complete, check_steps
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.settings.command_line import Parsed, parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.paths import absolute
from grpo_ds.system.hardware import check_versions
from grpo_ds.system.invocation import command
from grpo_ds.system.signals import exit_on_signal
from grpo_ds.system.streams import output_is_optional
from grpo_ds.task.prompts import prompt_warnings
from grpo_ds.task.questions import (
    Question,
    QuestionSet,
    fingerprint,
    first_in_proportion,
    not_among,
    read_questions,
)
from grpo_ds.task.records import NO_CONTEXT
from grpo_ds.task.reward_files import find_reward_functions, form_lines
from grpo_ds.task.rewards import WeightedFunctions, ready_made
from grpo_ds.task.scoring import columns_for_rewards
from grpo_ds.task.sources import RECORDS, Source
from grpo_ds.task.statistics import mean

if TYPE_CHECKING:
    from grpo_ds.training.reports import Outcome
    from grpo_ds.training.run import Run


QUARTERS = 4  # steps that a comparison of quarters needs


def main(argv: list[str]) -> None:
    with ending_cleanly():
        parsed = parse(TrainConfig, argv, about=__doc__)
        config = parsed.unchecked()
        if config.plan:
            print_plan(settle_parsed(parsed), of_data="data" in parsed.typed)
        elif config.num_seeds > 1:
            train_seeds(parsed, folder_of_seeds(config) or default_folder(config))
        else:
            run = begin(parsed)
            finish(run)
            run.close()


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Handle signals until the run itself does, and after it; let go of its folder, however it ends."""
    with exit_on_signal(leaving=release):
        try:
            yield
        finally:
            release()


def begin(parsed: Parsed[TrainConfig], source: Source | None = None) -> "Run":
    """Settle a run, read its data, lock its folder and load its model: everything up to its first evaluation.

    source: records that a script passed, in place of --data. Raises GrpoError.
    """
    settled = settle_parsed(parsed)
    config = settled.config
    output_is_optional()
    if config.preflight:
        check_versions()
    refuse_lost(config, source)
    questions = read_questions(source or config.data, **config.reading)
    config = replace(config, subject=subject_of(config.subject, config.data, questions))
    if config.context_field is None and not any(question.context for question in questions.questions):
        config = replace(config, context_field=NO_CONTEXT)  # saved, so that the model is asked as it was trained
    settled = replace(settled, config=config)
    rewards = reward_functions(config, questions)
    # A checkpoint's record has the model's own and the run's: with it the parts are the same again.
    before = read_trained_on(settled.resume_from or Path(config.model)) or frozenset()
    train, held_out = split_for_training(config, questions, before)
    settled = with_epochs(settled, len(train))
    config = settled.config
    this_run = inputs_of(train, held_out, config, settled.job.ds, rewards, ranks())
    set_aside = len(held_out)
    held_out = first_in_proportion(held_out, config.eval_limit, by_class=config.answer_format.is_closed)
    if config.lora_r and Path(config.model).is_dir() and (base := base_hash(config.model)):
        this_run[BASE] = base  # a model of the hub is known when it is loaded
    changed = check_resumable(settled, this_run)
    check_trackers(config.trackers)
    told = [*tried(config, rewards, train), *prompt_warnings(train[0], **config.prompting)]
    folder = output_folder(config, settled.resume_from)

    lines = [
        *first_lines(settled, questions, len(train), len(held_out), set_aside, folder),
        *form_lines(rewards),
        *questions.warnings,
        *told,
        *changed,
    ]
    if before and not settled.resume_from:
        known = len(questions.questions) - len(not_among(before, questions.questions))
        lines.append(f"{config.model} was trained on {known} of these questions before; none of them is held out")
    trained_on = before.union(map(fingerprint, train))
    return make_run(settled, rewards, lines, train, held_out, folder, this_run, trained_on)


def finish(run: "Run") -> "Outcome":
    """Run it to its end, and print what training changed and where it is."""
    outcome, say, folder = run.run(), run.console, run.folder
    say.before_and_after(outcome.before, outcome.after, outcome.questions)
    if len(outcome.rewards) >= QUARTERS:
        first, last = outcome.quarters()
        say.line(f"Mean reward: {first:.2f} in the first quarter of the steps, {last:.2f} in the last.")
    else:
        say.line(f"Mean reward: {mean(outcome.rewards):.2f}.")
    run.reports.verdict()
    merged = f"\nThe merged model: {folder / MERGED}" if (folder / MERGED).is_dir() else ""
    ask = f"{command('ask')} --model {shlex.quote(str(folder))}"
    say.line(f"Model, its card, metrics and memory: {folder}{merged}\nAsk it: {ask}")
    return outcome


def refuse_lost(config: TrainConfig, source: Source | None) -> None:
    """Raise UsageError for records or functions that a script passed to the run that this one resumes."""
    again = "train(TrainConfig(resume_from_checkpoint=...), data=..., reward_funcs=[...])"
    if config.data == RECORDS and source is None:
        raise UsageError(
            f"This run's records were passed to it in Python, so no file holds them. Pass them again:\n{again}\n"
            "Or name a file of the same records: --data FILE"
        )
    if lost := [name for name in passed(config.reward_funcs) if not hasattr(sys.modules.get(PASSED), name)]:
        raise UsageError(
            f"--reward_funcs: {', '.join(lost)} was passed to this run in Python, so no file is known that has it.\n"
            f"Pass it again: {again}"
        )


def check_resumable(settled: Settled, this_run: Mapping[str, str]) -> list[str]:
    """Return lines about changed inputs. Raises CheckpointError if the checkpoint cannot be resumed with them."""
    checkpoint, config = settled.resume_from, settled.config
    if not checkpoint:
        return []
    progress = Progress.read(checkpoint)
    check_complete(checkpoint, progress, config, settled.job.ds, ranks())
    check_steps(checkpoint, progress, config)
    return check_inputs(progress.identity, this_run, checkpoint, may_change=config.resume_changed_inputs)


def reward_functions(config: TrainConfig, questions: QuestionSet) -> WeightedFunctions:
    """Return the functions and weights of --reward_funcs and --reward_weights, checked against the data's columns."""
    return find_reward_functions(
        config.reward_funcs,
        config.reward_weights,
        columns=columns_for_rewards(questions.questions),
        completion_format=config.completion_format,
        ready_made=ready_made(
            answer_format=config.answer_format,
            correctness_reward=config.correctness_reward,
            format_reward=config.format_reward,
            max_completion_length=config.max_completion_length,
        ),
    )


def make_run(
    settled: Settled,
    rewards: WeightedFunctions,
    lines: list[str],
    train: list[Question],
    held_out: list[Question],
    folder: Path,
    this_run: Mapping[str, str] | None = None,
    trained_on: Collection[str] | None = None,
    *,
    exact_memory: bool = False,
) -> "Run":
    """Print `lines`, then load heavy libraries and the model, which takes a while.

    this_run: identity of the run (run_folder/progress.py). trained_on, exact_memory: see Trainer.
    """
    from grpo_ds.report.console import Console
    from grpo_ds.system import ranks
    from grpo_ds.training.checkpoint import load_checkpoint
    from grpo_ds.training.run import Run
    from grpo_ds.training.trainer import Trainer

    config = settled.config
    world = ranks.start(needs_gpu=settled.choice.needs_gpu)
    console = Console(speaks=world.is_first, ranks=world.size)
    for line in lines:
        console.line(line)
    free = world.free_gpu_gib()
    console.plan(settled.plan, free, settled.ram_gib)
    if free is not None and settled.plan.peak("gpu") > free * GIB:
        console.line(f"Warning: by this plan the run does not fit: CUDA has {free:.1f} GiB of the card free.")
    # The clocks of ranks differ, and another rank may be changing the file system.
    folder, origin = world.gather(folder)[0], settled.resume_from
    if any(other != origin for other in world.gather(origin)):
        raise CheckpointError("The ranks do not see the same checkpoints; they need one shared folder. Try again.")
    trainer = Trainer(
        config,
        settled.job.ds,
        world,
        console,
        rewards,
        settled.plan,
        origin=origin,
        identity=this_run,
        trained_on=trained_on,
        exact_memory=exact_memory,
    )
    if origin:
        load_checkpoint(trainer, origin, branch=origin.parent.resolve() != folder.resolve())
        console.line(f"Resuming from {origin}, step {trainer.progress.global_step} of {config.total_steps}")
    return Run(trainer, train, held_out, folder)


def output_folder(config: TrainConfig, origin: Path | None = None) -> Path:
    """Return the output folder, locked by rank 0: the checkpoint's when the run resumes, else a new or empty one.

    Raises UsageError for a folder that holds files or cannot be written to, CheckpointError if another run uses it.
    """
    named = Path(config.output_dir) if config.output_dir else None
    resumed = origin is not None and (named is None or named.resolve() == origin.parent.resolve())
    folder = origin.parent if origin and resumed else named or default_folder(config)
    check_writable(folder)
    if os.environ.get("RANK", "0") != "0":
        return folder  # make_run gives it rank 0's
    if resumed:
        lock(folder)
    elif named:
        lock_new(folder)
    else:
        folder = lock_first(folder)
    return folder


def default_folder(config: TrainConfig) -> Path:
    return Path(absolute("outputs")) / f"{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def lock_first(folder: Path) -> Path:
    """Lock a new folder of this name, with a number behind it if other runs were started in the same second."""
    for number in count(1):
        numbered = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FolderTaken, CheckpointError):
            lock_new(numbered)
            break
    return numbered
