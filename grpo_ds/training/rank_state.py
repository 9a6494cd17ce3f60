"""What each rank alone knows between two steps, or between two updates on one rollout: rank0.pt, rank1.pt, ...

Plain tensors, numbers and texts, so that they are read back without pickle's power to run code.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from grpo_ds.core.tally import Tally
from grpo_ds.errors import CheckpointError
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.rollout import PartialStep, Rollout
from grpo_ds.training.sampling import Completions


def write(folder: Path, rank: int, partial_step: PartialStep | None) -> None:
    torch.save(
        {"random": _random_states(), "partial_step": partial_step and _plain(partial_step)}, file_of(folder, rank)
    )


def read(folder: Path, rank: int, device: torch.device) -> PartialStep | None:
    """The step in hand, if there is one; the random states of user code are set."""
    try:
        saved = torch.load(file_of(folder, rank), map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file_of(folder, rank)} cannot be read: {error.strerror}.") from None
    for name, (_, put) in RANDOM.items():
        if name in saved["random"]:
            put(saved["random"][name])
    return _rebuilt(saved["partial_step"]) if saved["partial_step"] else None


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"


def _numpy_state() -> list[Any]:
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return [kind, numpy.asarray(keys).tolist(), *rest]


# Nothing of ours draws from these; a reward function may.
RANDOM: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "python": (random.getstate, random.setstate),
    "numpy": (_numpy_state, lambda state: numpy.random.set_state(tuple(state))),
    "torch": (torch.get_rng_state, lambda state: torch.set_rng_state(state.cpu())),
}


def _random_states() -> dict[str, Any]:
    return {name: get() for name, (get, _) in RANDOM.items()}


def _plain(step: PartialStep) -> dict[str, Any]:
    rollout = step.rollout
    done, rewards = rollout.completions, rollout.rewards
    return {
        "questions": [asdict(replace(question, columns={})) for question in rollout.questions],  # rewards have had them
        "prompts": rollout.prompts,
        "completions": [done.ids, done.mask, done.ended],
        "texts": rollout.texts,
        "rewards": [rewards.total, {name: list(values) for name, values in rewards.by_name.items()}, rewards.errors],
        "tensors": [rollout.advantages, rollout.counted, rollout.ref_logprobs],
        "redrawn": step.redrawn,
        "updates": step.updates,
        "old_logprobs": step.old_logprobs,
        "tally": step.tally.as_pairs(),
    }


def _rebuilt(plain: dict[str, Any]) -> PartialStep:
    rollout = Rollout(
        [Question(**question) for question in plain["questions"]],
        plain["prompts"],
        Completions(*plain["completions"]),
        plain["texts"],
        Rewards(*plain["rewards"]),
        *plain["tensors"],
    )
    tally = Tally.of_pairs(plain["tally"])
    return PartialStep(rollout, plain["redrawn"], plain["updates"], plain["old_logprobs"], tally)
