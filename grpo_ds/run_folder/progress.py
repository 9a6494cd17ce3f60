"""Progress of a run, saved as trainer_state.json: a transformers.TrainerState plus our own fields."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_ds.errors import CheckpointError
from grpo_ds.run_folder.inputs import (
    FIXED,
    LATE,
    PROMPTS,
    Inputs,
    changed_inputs,
    changed_line,
    other_inputs,
    question_key,
    shown_input,
)
from grpo_ds.task.answer_probs import AnswerProbs
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import CUT
from grpo_ds.task.grading import Evaluation, graded
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import summed

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
    identity: Inputs = field(default_factory=dict)  # hashes that a resumed run compares (inputs.py)
    global_step: int = 0  # steps done: a rollout and all its updates
    epoch: float = 0.0  # passes over the training questions
    num_input_tokens_seen: int = 0  # prompt and completion tokens of all ranks; logged as num_tokens
    log_history: list[dict[str, Any]] = field(default_factory=list)  # one line per step and per evaluation
    reference_step: int | None = None  # last step at which the reference was made again or confirmed
    first_weights: str = ""  # a sample of the weights that the run began with (training/weight_sample.py)
    weights_changed: float | None = None  # share of all trained weights that differ from the start's, when saved
    kl_floor: float | None = None  # KL of the reference to the policy that it was made from
    before: dict[str, str] | list[str] | None = None  # held-out answers before training, by question_key
    # Of the same: {"probs": [reasoned, empty, misled], "sampled": [...], "rewards": {name: value}}, what is known, and
    # {"cut": True} if it was cut at the length limit
    before_more: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_metric: float | None = None  # best accuracy of the evaluations during training
    best_global_step: int | None = None
    bad_steps: list[int] = field(default_factory=list)  # skipped steps in a row, up to now
    limits: dict[str, float] = field(default_factory=dict)  # limits that --oom_retry has made smaller
    trackers: dict[str, str] = field(default_factory=dict)  # tracker -> its id of this run
    changed_inputs: list[dict[str, Any]] = field(default_factory=list)  # {"step", "inputs"}: --resume_changed_inputs

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step."""
        rewards = [line["reward"] for line in self.log_history if "reward" in line]
        return [math.nan if reward is None else reward for reward in rewards]

    def shared(self) -> dict[str, Any]:
        """Fields of transformers.TrainerState, copied: a reward function gets them."""
        fields = {name: getattr(self, name) for name in THEIRS}
        return {**fields, "log_history": [dict(line) for line in self.log_history]}

    def keep_before(self, questions: Sequence[Question], evaluation: Evaluation) -> None:
        """Keep the held-out answers before training, so that a resumed run need not ask again."""
        keys = [question_key(question) for question in questions]
        self.before = dict(zip(keys, evaluation.texts, strict=True))
        probs, sampled, rewards = evaluation.probs, evaluation.sampled, evaluation.rewards
        self.before_more = {
            key: {
                **({"probs": [probs[i].reasoned, probs[i].empty, probs[i].misled]} if probs else {}),
                **({"sampled": sampled[i]} if sampled else {}),
                **({"rewards": {name: it[i] for name, it in rewards.by_name.items()}} if rewards else {}),
                **({"cut": True} if evaluation.broken[i] == CUT else {}),
            }
            for i, key in enumerate(keys)
        }

    def evaluation_before(self, answered: Mapping[Question, str], answer_format: AnswerFormat) -> Evaluation:
        """Grade the answers of `answered_before`, with what else is known of each of them."""
        more = [self.before_more.get(question_key(question), {}) for question in answered]
        probs = [AnswerProbs(*(p and (*p,) for p in it["probs"])) for it in more if "probs" in it]
        sampled = [it["sampled"] for it in more if "sampled" in it]
        rewards = [it["rewards"] for it in more if "rewards" in it]
        evaluation = graded(
            [*answered.values()],
            [*answered],
            answer_format,
            probs if len(probs) == len(answered) else None,
            sampled if len(sampled) == len(answered) else None,
            cut=["cut" in it for it in more],
        )
        if not rewards or len(rewards) < len(answered):
            return evaluation
        by_name = {name: [row.get(name) for row in rewards] for name in rewards[0]}
        return evaluation.rewarded(summed(by_name))

    def answered_before(self, questions: Sequence[Question]) -> dict[Question, str]:
        """Return those of the held-out questions that were answered before training, with their answers.

        A run may be resumed with other held-out questions (--eval_limit). An older version kept a list of answers.
        """
        if isinstance(self.before, list):
            return dict(zip(questions, self.before, strict=True)) if len(self.before) == len(questions) else {}
        before, keys = self.before or {}, {question: question_key(question) for question in questions}
        return {question: before[key] for question, key in keys.items() if key in before}

    def continue_with(self, inputs: Mapping[str, str]) -> None:
        """Use the inputs of a resumed run, and note which of them have changed; {}: they are not known."""
        if inputs:
            self.note_changed(changed_inputs(self.identity, inputs))
            late = {name: hashed for name, hashed in self.identity.items() if name in LATE}
            self.identity = {**late, **inputs}

    def note_changed(self, inputs: Sequence[str]) -> None:
        """Note inputs that are other ones from this step on."""
        if inputs:
            self.changed_inputs.append({"step": self.global_step, "inputs": list(inputs)})

    def changes(self) -> list[str]:
        """Return a text for each input that had changed when the run was resumed."""
        return [
            f"{shown_input(it)}, at step {change['step']}" for change in self.changed_inputs for it in change["inputs"]
        ]

    def check_late(self, name: str, hashed: str, *, may_change: bool) -> str | None:
        """Note the hash of an input that is known after loading; return a line if it has changed.

        Raises CheckpointError if it may not have changed.
        """
        if self.identity.setdefault(name, hashed) == hashed:
            return None
        if name in FIXED or not may_change:
            raise other_inputs(f"checkpoint-{self.global_step}", [name])
        self.identity[name] = hashed
        self.note_changed([name])
        return changed_line([name])

    def check_prompts(self, prompts: Sequence[Sequence[int]], *, may_change: bool = False) -> str | None:
        """Note the token ids of all training prompts, as `check_late`."""
        digest = hashlib.sha256()
        for ids in prompts:  # one at a time: all together would be a text of gigabytes
            digest.update(json.dumps(ids).encode())
        return self.check_late(PROMPTS, digest.hexdigest(), may_change=may_change)

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
