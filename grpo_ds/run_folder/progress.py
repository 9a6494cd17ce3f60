"""Progress of a run, saved as trainer_state.json: a transformers.TrainerState plus our own fields."""

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
# Fields of transformers.TrainerState; the rest is ours.
THEIRS = (
    "max_steps",
    "global_step",
    "epoch",
    "num_input_tokens_seen",
    "log_history",
    "best_metric",
    "best_global_step",
)
PROMPTS = "the prompts"  # in a run's identity, once its tokenizer is loaded
CALLBACKS, OURS = "stateful_callbacks", "grpo_ds"  # place in a TrainerState for fields that it does not know
# Metric names of older versions, before this trainer used TRL's names.
RENAMED_METRICS = {
    "completion_length": "completions/mean_length",
    "clip_ratio/low": "clip_ratio/low_mean",
    "clip_ratio/high": "clip_ratio/high_mean",
    "clip_fraction": "clip_ratio/region_mean",
}


@dataclass(slots=True)
class Progress:
    """State of a run that is neither in the weights nor a function of (seed, step, rank).

    Example:
        Progress(max_steps=100, global_step=50, epoch=0.78, reference_step=0, kl_floor=0.0018, best_metric=0.61)
    """

    max_steps: int
    identity: dict[str, str] = field(default_factory=dict)  # digests that a resumed run must share with this one
    global_step: int = 0  # steps done: a rollout and all its updates
    epoch: float = 0.0  # passes over the training questions
    num_input_tokens_seen: int = 0  # prompt and completion tokens of all ranks; logged as num_tokens
    log_history: list[dict[str, Any]] = field(default_factory=list)  # one line per step and per evaluation
    reference_step: int | None = None  # last step at which the reference was made again or confirmed
    kl_floor: float | None = None  # KL of the reference to the policy that it was made from
    before: list[str] | None = None  # held-out answers before training
    best_metric: float | None = None  # best accuracy of the evaluations during training
    best_global_step: int | None = None
    bad_steps: list[int] = field(default_factory=list)  # skipped steps in a row, up to now
    limits: dict[str, float] = field(default_factory=dict)  # limits that --oom_retry has made smaller
    trackers: dict[str, str] = field(default_factory=dict)  # tracker -> its id of this run

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step."""
        rewards = [line["reward"] for line in self.log_history if "reward" in line]
        return [math.nan if reward is None else reward for reward in rewards]

    def shared(self) -> dict[str, Any]:
        """Fields of transformers.TrainerState, copied: a reward function gets them."""
        fields = {name: getattr(self, name) for name in THEIRS}
        return {**fields, "log_history": [dict(line) for line in self.log_history]}

    def keep_before(self, texts: list[str]) -> None:
        """Keep the held-out answers before training, so that a resumed run need not ask again."""
        self.before = texts

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Note the token ids of all prompts. Raises CheckpointError if a resumed run noted others."""
        digest = hashlib.sha256()
        for ids in prompts:  # one at a time: all together would be a text of gigabytes
            digest.update(json.dumps(ids).encode())
        if self.identity.setdefault(PROMPTS, digest.hexdigest()) != digest.hexdigest():
            raise CheckpointError(
                f"The checkpoint of step {self.global_step} cannot be resumed: its prompts now have other token ids.\n"
                "Questions, flags, template and tokenizer are the same, so a version differs: use the versions in\n"
                "environment.json, or train further from its weights in a new run:\n"
                "--model CHECKPOINT --output_dir ANOTHER"
            )

    def set_best(self, metric: float | None, step: int | None) -> None:
        """Set the best accuracy during training and its step, whose checkpoint is kept."""
        self.best_metric, self.best_global_step = metric, step

    def write(self, folder: Path) -> None:
        """Write trainer_state.json."""
        ours = asdict(self)
        theirs = {name: ours.pop(name) for name in THEIRS}
        best = None if self.best_global_step is None else f"checkpoint-{self.best_global_step}"
        state = {**theirs, "best_model_checkpoint": best, CALLBACKS: {OURS: ours}}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Read trainer_state.json of this version or an older one. Raises CheckpointError for any other file."""
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            ours = state.pop(CALLBACKS, {}).get(OURS, {})  # the first version kept them on the top level
            state.pop("best_model_checkpoint", None)  # follows from best_global_step
            progress = cls(**state, **ours)
            progress.log_history = [current_names(line) for line in progress.log_history]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / STATE_FILE} is not a file that this version writes ({type(error).__name__}).\n"
                f"To train further from its weights: --model {folder}, without --resume_from_checkpoint."
            ) from None
        return progress


def identity(
    train: Sequence[Question], held_out: Sequence[Question], system_prompt: str, ds: DsConfig, ranks: int
) -> dict[str, str]:
    """Digests of a run's inputs, besides its flags, that its numbers depend on."""
    return {
        "the questions": _digest([[q.id, q.text, q.context, q.label] for q in (*train, *held_out)]),
        "the system prompt": _digest(system_prompt),
        "the DeepSpeed JSON": _digest({**ds.engine, "optimizer": asdict(ds.optimizer), "rounding": ds.rounding}),
        "the number of ranks": str(ranks),
    }


def check_identity(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path) -> None:
    """Raise CheckpointError if the checkpoint belongs to a run with other inputs."""
    changed = [what for what in now if saved.get(what) != now[what]]
    if changed:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: it was made with other values of {' and '.join(changed)}.\n"
            "Use the same values again, "
            f"or train further from its weights in a new run:\n--model {checkpoint} --output_dir ANOTHER"
        )


def current_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics, of this version or an older one, under the names of this version."""
    renamed: dict[str, Any] = {}
    for name, value in line.items():
        if name == "ended":  # share that was not cut at the length limit
            renamed["completions/clipped_ratio"] = None if value is None else 1 - value
        elif name.startswith("rewards/") and name.count("/") == 1:
            renamed[f"{name}/mean"] = value
        else:
            renamed[RENAMED_METRICS.get(name, name)] = value
    return renamed


def strict(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
