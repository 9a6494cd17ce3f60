"""Fine-tune a language model by GRPO on questions with a known answer, with DeepSpeed ZeRO-2 and CPU offload.

Arguments, data and the DeepSpeed JSON are checked before anything heavy is loaded or anything is written.
"""

import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

from grpo_ds.errors import CheckpointError, UsageError
from grpo_ds.memory.choose import Choice, choose_model
from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.memory.select import Job, fitted
from grpo_ds.models.presets import lora_recipe
from grpo_ds.models.shapes import adapter_base, shape_of
from grpo_ds.report.trackers import check_trackers
from grpo_ds.run_folder.lock import check_writable
from grpo_ds.run_folder.progress import Progress, check_identity, identity
from grpo_ds.run_folder.resume import check_complete, find_checkpoint, flags_of, refuse_other_flags
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig, resolve_ds_config
from grpo_ds.system.hardware import check_torch, cpu_has_bf16, gpu_memory_gib, ram_gib
from grpo_ds.system.invocation import command
from grpo_ds.system.signals import exit_on_signal
from grpo_ds.system.versions import check_versions
from grpo_ds.task.questions import Question, QuestionSet, read_questions, split_questions
from grpo_ds.task.reward_files import find_reward_functions
from grpo_ds.task.rewards import WeightedFunctions, ready_made
from grpo_ds.task.sources import data_or_default
from grpo_ds.terminal import escape_control_chars

if TYPE_CHECKING:
    from grpo_ds.training.run import Run

PLAN_WIDTH = 120  # columns where the output is no terminal


def main(argv: list[str]) -> None:
    with exit_on_signal():  # until the run itself takes signals, and after it
        train_from(argv)


def train_from(argv: list[str]) -> None:
    settled = settle(argv)
    config = settled.config
    if config.plan:
        return print_plan(settled)
    if config.preflight:
        check_versions()
    questions = read_questions(config.data, labels=config.label_names, fields=config.field_names)
    rewards = reward_functions(config, questions)
    train, held_out = split_questions(questions.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    held_out = held_out[: config.eval_limit]
    folder = output_folder(config, settled.resume_from)
    this_run = identity(train, held_out, config.system_prompt_text, settled.job.ds, ranks())
    if settled.resume_from:
        progress = Progress.read(settled.resume_from)
        check_identity(progress.identity, this_run, settled.resume_from)
        check_complete(settled.resume_from, progress, config, settled.job.ds, ranks())
    check_trackers(config.trackers)

    lines = first_lines(settled, questions, len(train), len(held_out))
    run = make_run(settled, rewards, lines, train, held_out, folder)
    run.progress.identity = this_run
    outcome = run.whole()
    say = run.console
    say.before_and_after(outcome.before, outcome.after, held_out)
    say.line("Mean reward: {:.2f} in the first quarter of the steps, {:.2f} in the last.".format(*outcome.quarters()))
    say.line(
        f"Model, its card, metrics and memory: {folder}\nAsk it: {command('ask')} --model {shlex.quote(str(folder))}"
    )
    run.close()


def reward_functions(config: TrainConfig, questions: QuestionSet) -> WeightedFunctions:
    """--reward_funcs and --reward_weights, checked against the data's columns."""
    return find_reward_functions(
        config.reward_funcs,
        config.reward_weights,
        columns=questions.questions[0].columns,
        ready_made=ready_made(
            answer_format=config.answer_format,
            correctness_reward=config.correctness_reward,
            format_reward=config.format_reward,
            max_completion_length=config.max_completion_length,
        ),
    )


def make_run(
    settled: "Settled",
    rewards: WeightedFunctions,
    lines: list[str],
    train: list[Question],
    held_out: list[Question],
    folder: Path,
) -> "Run":
    """From here on heavy libraries are loaded; `lines` are said before the wait for the model."""
    from grpo_ds.report.console import Console
    from grpo_ds.system import ranks
    from grpo_ds.training import checkpoint as snapshot
    from grpo_ds.training.run import Run
    from grpo_ds.training.trainer import Trainer

    config = settled.config
    here = ranks.start(needs_gpu=settled.choice.needs_gpu)
    console = Console(speaks=here.is_first)
    for line in lines:
        console.line(line)
    console.plan(settled.plan, settled.gpu_gib, settled.ram_gib)
    # Ranks name their folders by their own clocks, and look at a file system that one of them may be changing.
    folder, origin = here.gather(folder)[0], settled.resume_from
    if any(other != origin for other in here.gather(origin)):
        raise CheckpointError(
            "The ranks do not see the same checkpoints; all of them need one shared folder. Try again."
        )
    # A whole model's weights come from the checkpoint; an adapter's stand in the engine's state, upon the same base.
    weights = None if config.lora_r else origin
    trainer = Trainer(config, settled.job.ds, here, console, rewards, settled.plan, weights=weights)
    if origin:
        snapshot.read(trainer, origin)
        if origin.parent.resolve() != folder.resolve():
            trainer.progress.trackers.clear()  # a branch of that run, and not that run
        console.line(f"Going on from {origin}, step {trainer.progress.global_step} of {config.total_steps}")
    return Run(trainer, train, held_out, folder)


@dataclass(frozen=True, slots=True)
class Settled:
    """A run that can begin: flags, the model they mean, the DeepSpeed JSON filled from them, the memory it takes."""

    choice: Choice
    config: TrainConfig
    job: Job
    plan: Plan
    gpu_gib: float | None
    ram_gib: float
    resume_from: Path | None  # a checkpoint, verified
    told: list[str]  # of others, that are damaged


def settle(argv: list[str]) -> Settled:
    """Everything that can be known before anything heavy is loaded."""
    check_torch()
    asked = parse(TrainConfig, argv, about=__doc__)
    origin, told, saved = None, list[str](), dict[str, Any]()
    if asked.config.resume_from_checkpoint:
        origin, told = find_checkpoint(asked.config)
        saved = flags_of(origin)
        asked = parse(TrainConfig, argv, about=__doc__, recipe=saved)
    gpu, ram = gpu_memory_gib(), ram_gib()

    def resolved(config: TrainConfig) -> DsConfig:
        sizes = config.ds_sizes(bf16=gpu is not None or cpu_has_bf16(), world_size=ranks())
        return resolve_ds_config(config.ds, fill=sizes, explicit=asked.typed)

    choice = choose_model(
        asked.config.model, gpu_gib=gpu, ram_gib=ram, run=lambda: (asked.config, resolved(asked.config))
    )
    recipe = saved or lora_recipe(choice.recipe, asked.config)
    config = parse(TrainConfig, [*argv, "--model", choice.model], about=__doc__, recipe=recipe).config
    if config.lora_r and (base := adapter_base(config.model)):
        raise UsageError(
            f"--model {config.model} is an adapter on {base}, and a second one needs an ordinary model below it.\n"
            "Name the merged model of that run (--merge_adapter writes one into its folder merged), or --lora_r 0,\n"
            "which merges the adapter on loading and trains all parameters."
        )
    shape = shape_of(config.model, trust_remote_code=config.trust_remote_code)
    longest = config.max_prompt_length + config.max_completion_length
    if shape.positions and longest > shape.positions:
        raise UsageError(
            f"--model {config.model} has learned {shape.positions} positions, and --max_prompt_length "
            f"{config.max_prompt_length} and\n--max_completion_length {config.max_completion_length} make {longest}. "
            f"Try --max_prompt_length {max(1, shape.positions - config.max_completion_length)}."
        )
    ds = resolved(config)
    # What the run really uses, so that the config written beside the model makes the same run again.
    config = replace(
        config,
        data=data_or_default(config.data),
        learning_rate=ds.learning_rate,
        weight_decay=ds.weight_decay,
        max_grad_norm=ds.max_grad_norm,
    )
    if origin:
        refuse_other_flags(config, saved, origin)
    job = fitted(Job(shape, config, ds, "cuda" if gpu else "cpu"), gpu or 0, ram)
    return Settled(choice, job.config, job, job.plan(), gpu, ram, origin, told)


def ranks() -> int:
    """As many as the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print_plan(settled: Settled) -> None:
    """--plan: what each phase takes, and whether it fits."""
    from rich.console import Console
    from rich.text import Text

    from grpo_ds.report.plan import components, in_a_line

    console = Console(width=None if Console().is_terminal else PLAN_WIDTH, highlight=False, soft_wrap=True)
    places: tuple[Where, ...] = ("gpu", "host") if settled.gpu_gib else ("host",)
    for where in places:
        console.print(components(settled.plan, f"{settled.config.model}, {settled.config.ds}", where))
    console.print(Text(escape_control_chars(in_a_line(settled.job, settled.plan, settled.gpu_gib, settled.ram_gib))))


def output_folder(config: TrainConfig, origin: Path | None = None) -> Path:
    """Where the run is written; one that holds anything is never written over, but the run of a checkpoint goes on."""
    if origin and (not config.output_dir or Path(config.output_dir).resolve() == origin.parent.resolve()):
        check_writable(origin.parent)
        return origin.parent
    named = f"{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.output_dir) if config.output_dir else Path("outputs") / named
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):  # a link to nowhere is no folder
        raise UsageError(
            f"--output_dir {folder} already holds files, and a run is never written over.\n"
            "Name another folder, or remove this one."
        )
    check_writable(folder)
    return folder


def first_lines(settled: Settled, questions: QuestionSet, train: int, held_out: int) -> list[str]:
    """What was chosen and why, before the wait for the model."""
    from grpo_ds.report.plan import in_a_line

    choice, config, ds = settled.choice, settled.config, settled.job.ds
    left_out = ", ".join(f"{count} {label!r} left out" for label, count in questions.left_out.items())
    per_step = f"{config.batch_size} questions x {config.num_generations} completions of at most"
    precision = "bf16" if ds.bf16 else "fp32, as bf16 is off in the JSON or not native to this CPU"
    return [
        *settled.told,
        f"Model: {config.model} ({choice.why}), in {precision}{adapter_line(settled)}",
        f"Data: {questions.source}{f' ({left_out})' if left_out else ''}; {train} to train on, {held_out} held out",
        f"Plan: {config.total_steps} steps of {per_step} {config.max_completion_length} tokens; "
        f"learning rate {ds.learning_rate:g}, beta {config.beta:g}, seed {config.seed}",
        in_a_line(settled.job, settled.plan, settled.gpu_gib, settled.ram_gib),
        *checkpoint_lines(settled),
    ]


def checkpoint_lines(settled: Settled) -> list[str]:
    """How large checkpoints are, and whether the disk has room for them."""
    config, size = settled.config, settled.plan.checkpoint / GIB
    if not config.save_steps:
        return []
    kept = config.save_total_limit or -(-config.total_steps // config.save_steps)
    folder = output_folder(config, settled.resume_from)
    free = disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.is_dir())).free / GIB
    line = f"Checkpoints: every {config.save_steps} steps and at the end, {size:.1f} GiB each, {kept} kept"
    short = (
        f"Warning: with one being written they take {(kept + 1) * size:.1f} GiB, and {free:.1f} are free in {folder}."
    )
    return [line, short] if (kept + 1) * size > free else [line]


def adapter_line(settled: Settled) -> str:
    """How much of the model an adapter trains, upon what."""
    config, shape = settled.config, settled.job.shape
    if not config.lora_r:
        return ""
    trained = shape.lora_parameters(config.lora_r, config.lora_targets)
    base = f"a base in {config.base_bits} bits" if config.base_bits < 16 else "a frozen base"
    share = f"{trained / 1e6:.1f} M beside {shape.parameters / 1e6:.0f} M parameters"
    return f"; a LoRA adapter of rank {config.lora_r} on {base}, {share}"
