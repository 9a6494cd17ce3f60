"""All of a trainer's state, in a checkpoint's folder: what is written, and how it is taken up again.

checkpoint-N/
    config.json, model.safetensors, tokenizer.json ...   an ordinary model folder (of an adapter, the adapter)
    grpo_config.yaml        the flags
    trainer_state.json      how far the run has come (progress.py)
    rank0.pt                a rollout between two of its updates, the random states of user code (rank_state.py)
    reference.pt            the frozen copy of the policy, if there is one
    global_stepN/           DeepSpeed's shards: masters, moments, schedule
    MANIFEST.json           every file's size and SHA-256 (checkpoint.py)
"""

from pathlib import Path

import torch
from safetensors import SafetensorError

from grpo_ds.errors import CheckpointError, GrpoError
from grpo_ds.models.policy import save_model
from grpo_ds.models.reference import make_reference
from grpo_ds.run_folder import checkpoints
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import write_config
from grpo_ds.training import rank_state
from grpo_ds.training.nonfinite import refuse_bad_weights
from grpo_ds.training.trainer import Trainer

REFERENCE_FILE = "reference.pt"


def write(trainer: Trainer, run: Path) -> Path:
    """checkpoint-N in the folder of the run; every rank calls it.

    Raises CheckpointError, or NumbersError for weights that are not finite, with what was there before untouched.
    """
    step, world = trainer.progress.global_step, trainer.world
    refuse_bad_weights(trainer.engine.model)
    partial = checkpoints.partial_of(run, step)
    try:
        with trainer.profiler.phase("save"):
            if world.is_first:
                checkpoints.begin(partial)
            world.wait()
            trainer.engine.save_checkpoint(partial, _tag(step))
            rank_state.write(partial, world.rank, trainer.partial_step)
            world.wait()
            if world.is_first:
                _look_for_all_ranks(partial, world.size)
                _write_shared(trainer, partial)
                checkpoints.finish(partial)
            world.wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        checkpoints.remove(partial)
        raise CheckpointError(checkpoints.why_not_written(run, step, error)) from error
    except GrpoError:  # out of memory
        checkpoints.remove(partial)
        raise
    if world.is_first:
        checkpoints.rotate(run, trainer.config.save_total_limit, newest=step, best=trainer.progress.best_global_step)
    return checkpoints.folder_of(run, step)


def _look_for_all_ranks(partial: Path, ranks: int) -> None:
    missing = [rank for rank in range(ranks) if not rank_state.file_of(partial, rank).is_file()]
    if missing:
        raise OSError(f"what rank {missing[0]} wrote is not there; all machines need one shared folder")


def _write_shared(trainer: Trainer, folder: Path) -> None:
    """What is the same on all ranks."""
    save_model(trainer.engine.model, folder)
    trainer.tokenizer.save_pretrained(folder)
    write_config(trainer.config, folder)
    if trainer.reference:
        torch.save(trainer.reference.state(), folder / REFERENCE_FILE)
    trainer.progress.limits = trainer.limits.halved(trainer.config)
    trainer.progress.bad_steps = trainer.bad_steps.in_a_row
    trainer.progress.write(folder)


def read(trainer: Trainer, folder: Path) -> None:
    """Take up what `write` wrote; every rank calls it, with a whole model's weights loaded from there already."""
    with trainer.profiler.phase("resume"):
        progress = Progress.read(folder)
        trainer.engine.load_checkpoint(folder, _tag(progress.global_step))
        if (file := folder / REFERENCE_FILE).exists():
            trainer.reference = make_reference(trainer.engine.policy, trainer.config.reference_kind)
            trainer.reference.load_state(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        trainer.partial_step = rank_state.read(folder, trainer.world.rank, trainer.world.device)
    trainer.progress, trainer.bad_steps.in_a_row = progress, progress.bad_steps
    progress.max_steps = trainer.config.total_steps
    for name, value in progress.limits.items():
        setattr(trainer.limits, name, min(value, getattr(trainer.limits, name)))
    trainer.apply_limits()


def _tag(step: int) -> str:
    return f"global_step{step}"
