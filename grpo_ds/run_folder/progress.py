"""How far a run has come, as trainer_state.json keeps it: a transformers.TrainerState, and below it what is ours."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_ds.errors import CheckpointError
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.task.questions import Question

STATE_FILE = "trainer_state.json"
THEIRS = ("max_steps", "global_step", "log_history", "best_metric", "best_global_step")  # transformers' own names
CALLBACKS, OURS = "stateful_callbacks", "grpo_ds"  # where a TrainerState keeps what it does not know


@dataclass(slots=True)
class Progress:
    """What is not in the weights, nor a function of (seed, step, rank)."""

    max_steps: int
    identity: dict[str, str] = field(default_factory=dict)  # what a resumed run must have in common with this one
    global_step: int = 0  # rollouts done with
    log_history: list[dict[str, Any]] = field(default_factory=list)  # a line a step, and one an evaluation on the way
    reference_step: int | None = None  # for which the reference was last looked at
    kl_floor: float | None = None  # of the reference to the policy it was made from
    before: list[str] | None = None  # the held-out answers before training
    best_metric: float | None = None  # of the evaluations along the way
    best_global_step: int | None = None
    bad_steps: list[int] = field(default_factory=list)  # in a row, skipped up to here
    limits: dict[str, float] = field(default_factory=dict)  # what --oom_retry has made smaller
    trackers: dict[str, str] = field(default_factory=dict)  # what a tracker calls this run

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step."""
        found = [line["reward"] for line in self.log_history if "reward" in line]
        return [math.nan if reward is None else reward for reward in found]

    def write(self, folder: Path) -> None:
        ours = asdict(self)
        theirs = {name: ours.pop(name) for name in THEIRS}
        best = None if self.best_global_step is None else f"checkpoint-{self.best_global_step}"
        whole = {**theirs, "best_model_checkpoint": best, CALLBACKS: {OURS: ours}}
        (folder / STATE_FILE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        try:
            found = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            ours = found.pop(CALLBACKS, {}).get(OURS, {})  # a first version had them on top
            found.pop("best_model_checkpoint", None)  # follows from best_global_step
            return cls(**found, **ours)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / STATE_FILE} is not what this version writes ({type(error).__name__}).\n"
                f"To train on from its weights: --model {folder}, without --resume_from_checkpoint."
            ) from None


def identity(
    train: Sequence[Question], held_out: Sequence[Question], system_prompt: str, ds: DsConfig, ranks: int
) -> dict[str, str]:
    """Digests of what decides the numbers of a run, beside its flags."""
    return {
        "the questions": _digest([[q.id, q.text, q.context, q.label] for q in (*train, *held_out)]),
        "the system prompt": _digest(system_prompt),
        "the DeepSpeed JSON": _digest({**ds.engine, "optimizer": asdict(ds.optimizer), "rounding": ds.rounding}),
        "the number of ranks": str(ranks),
    }


def check_identity(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path) -> None:
    """Raises CheckpointError where the run to be resumed was another one."""
    changed = [what for what in now if saved.get(what) != now[what]]
    if changed:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: it was made with other values of {' and '.join(changed)}.\n"
            "Give it what it was made with, "
            f"or train on from its weights in a run of their own:\n--model {checkpoint} --output_dir ANOTHER"
        )


def strict(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: null, as in a step that was skipped for them."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
