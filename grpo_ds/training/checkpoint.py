"""A trainer's state in a checkpoint's folder: how it is saved, and how it is loaded.

checkpoint-N/
    config.json, model.safetensors, tokenizer.json ...   an ordinary model folder; with LoRA only the adapter
    chat_texts.json         the chat template's text of the prompts (models/chat_texts.py)
    grpo_config.yaml        the flags
    trained_on.txt          hashes of the questions (run_folder/trained_on.py)
    trainer_state.json      how far the run has come (run_folder/progress.py)
    rank0.pt, rank1.pt ...  per rank: a rollout between two of its updates, random states for user code
    reference.pt            the frozen copy of the policy, if there is one
    global_stepN/           DeepSpeed's shards: masters, moments, schedule
    MANIFEST.json           every file's size and SHA-256 (run_folder/checkpoints.py)
"""

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError

from grpo_ds.core.expected_reward import LabelAdvantages, LabelProbs
from grpo_ds.core.tally import Tally
from grpo_ds.errors import CheckpointError
from grpo_ds.models.chat_texts import save_tokenizer
from grpo_ds.models.policy import save_model
from grpo_ds.run_folder import checkpoints
from grpo_ds.run_folder.progress import Progress, current_names
from grpo_ds.run_folder.trained_on import write_trained_on
from grpo_ds.settings.saved_config import write_config
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.nonfinite import refuse_bad_weights
from grpo_ds.training.rollout import PartialStep, Rollout
from grpo_ds.training.sampling import Completions
from grpo_ds.training.trainer import Trainer

REFERENCE_FILE = "reference.pt"
State = dict[str, Any]


def save_checkpoint(trainer: Trainer, run: Path) -> Path:
    """Write checkpoint-N into the folder of the run and return its path; every rank calls it.

    Raises CheckpointError, or NumbersError for weights that are not finite; earlier checkpoints stay untouched.
    """
    state, world = trainer.state_dict(), trainer.world
    progress: Progress = state["progress"]
    refuse_bad_weights(trainer.engine.model)
    partial = checkpoints.partial_of(run, progress.global_step)
    try:
        trainer.guard.run("save", _write, trainer, state, partial)
    except BaseException as error:
        checkpoints.undo(partial)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise CheckpointError(checkpoints.why_not_written(run, progress.global_step, error)) from error
        raise
    if world.is_first:
        limit, best = trainer.config.save_total_limit, progress.best_global_step
        checkpoints.rotate(run, limit, newest=progress.global_step, best=best)
    return checkpoints.folder_of(run, progress.global_step)


def load_checkpoint(trainer: Trainer, folder: Path, *, branch: bool = False) -> None:
    """Load a checkpoint; every rank calls it, with a full model's weights loaded from its folder already.

    branch: the run continues in another folder, so trackers must treat it as a new run.
    """
    trainer.guard.run("resume", _read, trainer, folder, branch)


def write_beside(trainer: Trainer, folder: Path) -> None:
    """Write what later commands read beside the model: its settings, and what it was trained on."""
    write_config(trainer.config, folder)
    if trainer.trained_on is not None:
        write_trained_on(folder, trainer.trained_on)


def _write(trainer: Trainer, state: State, partial: Path) -> None:
    world = trainer.world
    if world.is_first:
        checkpoints.begin(partial)
    world.wait()
    trainer.engine.save_checkpoint(partial, _tag(state["progress"]))
    torch.save(_rank_state(state["partial_step"]), rank_file(partial, world.rank))
    world.wait()
    if world.is_first:
        _check_all_ranks_wrote(partial, world.size)
        _write_shared(trainer, state, partial)
        checkpoints.finish(partial)
    world.wait()


def _check_all_ranks_wrote(partial: Path, ranks: int) -> None:
    missing = [rank for rank in range(ranks) if not rank_file(partial, rank).is_file()]
    if missing:
        raise OSError(f"the file of rank {missing[0]} is missing; all machines need one shared folder")


def _write_shared(trainer: Trainer, state: State, folder: Path) -> None:
    """Write the files that all ranks share."""
    trainer.count_changed_weights()
    save_model(trainer.engine.model, folder)
    save_tokenizer(trainer.tokenizer, folder)
    write_beside(trainer, folder)
    if state["reference"] is not None:
        torch.save(state["reference"], folder / REFERENCE_FILE)
    state["progress"].write(folder)


def _read(trainer: Trainer, folder: Path, branch: bool) -> None:
    progress, reference = Progress.read(folder), folder / REFERENCE_FILE
    if branch:
        progress.trackers.clear()
    trainer.engine.load_checkpoint(folder, _tag(progress))
    partial_step, random_states = _read_rank_state(rank_file(folder, trainer.world.rank), trainer.world.device)
    trainer.load_state_dict(
        {
            "progress": progress,
            "partial_step": partial_step,
            "reference": _mapped(reference) if reference.exists() else None,
            "run": folder.parent,
        }
    )
    _set_random_states(random_states)  # last: loading may draw


def _mapped(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _tag(progress: Progress) -> str:
    return f"global_step{progress.global_step}"


# --- the state of one rank: plain tensors, numbers and texts, read without letting pickle run code ------------------


def rank_file(folder: Path, rank: int) -> Path:
    """Path of a rank's own file in a checkpoint."""
    return folder / f"rank{rank}.pt"


def _rank_state(step: PartialStep | None) -> State:
    return {"partial_step": step and _as_plain(step), "random": {name: get() for name, (get, _) in RANDOM.items()}}


def _read_rank_state(file: Path, device: torch.device) -> tuple[PartialStep | None, State]:
    """Return the partial step, if there is one, and the random states of user code."""
    try:
        saved = torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    plain = saved.get("partial_step") or saved.get("in_hand")  # its name in older checkpoints
    return _from_plain(plain) if plain else None, saved["random"]


def _set_random_states(states: State) -> None:
    for name, (_, put) in RANDOM.items():
        if name in states:
            put(states[name])


def _numpy_state() -> list[Any]:
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return [kind, numpy.asarray(keys).tolist(), *rest]


# Nothing in this package draws from these generators; a reward function may.
RANDOM: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "python": (random.getstate, random.setstate),
    "numpy": (_numpy_state, lambda state: numpy.random.set_state(tuple(state))),
    "torch": (torch.get_rng_state, lambda state: torch.set_rng_state(state.cpu())),
}


def _as_plain(step: PartialStep) -> State:
    rollout = step.rollout
    completions, rewards, labels, of_labels = rollout.completions, rollout.rewards, rollout.labels, rollout.of_labels
    return {
        "questions": [asdict(replace(question, columns={})) for question in rollout.questions],  # rewards are done
        "prompts": rollout.prompts,
        "completions": [completions.ids, completions.mask, completions.ended],
        "texts": rollout.texts,
        "rewards": [
            rewards.total,
            {name: list(values) for name, values in rewards.by_name.items()},
            *(rewards.errors, rewards.extra, rewards.metrics),
        ],
        "tensors": [rollout.advantages, rollout.counted, rollout.ref_logprobs],
        "labels": labels and [labels.places, labels.ids, labels.probs, labels.right],
        "label_advantages": of_labels and [of_labels.labels, of_labels.drawn],
        "redrawn": step.redrawn,
        "updates": step.updates,
        "old_logprobs": step.old_logprobs,
        "tally": step.tally.as_pairs(),
    }


def _from_plain(plain: State) -> PartialStep:
    advantages, counted, ref_logprobs = plain["tensors"]
    labels, of_labels = plain.get("labels"), plain.get("label_advantages")  # older checkpoints have none
    rollout = Rollout(
        [Question(**question) for question in plain["questions"]],
        plain["prompts"],
        Completions(*plain["completions"]),
        plain["texts"],
        Rewards(*plain["rewards"]),
        labels and LabelProbs(*labels),
        advantages,
        counted,
        ref_logprobs,
        of_labels and LabelAdvantages(*of_labels),
    )
    tally = Tally.of_pairs(current_names(plain["tally"]))
    return PartialStep(rollout, plain["redrawn"], plain["updates"], plain["old_logprobs"], tally)
