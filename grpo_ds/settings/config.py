"""Every knob of a run, one line each; command line and YAML (`--config FILE`) are made from it (command_line.py).

Names are TRL's where TRL has them. A preset's recipe (models/presets.py) replaces defaults, never what
was typed. Nothing heavy is imported here: --help and a mistyped flag are answered at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from grpo_ds.core.objective import KlEstimator, LossType, Objective, RewardScale
from grpo_ds.errors import UsageError
from grpo_ds.settings.ds_config import DsSizes
from grpo_ds.task.answers import TAG_NAME, AnswerFormat
from grpo_ds.task.prompts import read_system_prompt, worked_examples
from grpo_ds.task.records import NO_CONTEXT, Unusable
from grpo_ds.task.reward_files import reward_problems
from grpo_ds.task.rewards import READY_MADE
from grpo_ds.task.scoring import OnRewardError

ReferenceKind = Literal["auto", "int8", "llm.int8", "bf16", "bf16-cpu"]
MAX_TIMEOUT = 1e6  # seconds, twelve days: an alarm cannot be set to more than an int holds
TRACKERS = ("none", "wandb", "tensorboard", "trackio")
CONFIG_FILE = "grpo_config.yaml"  # written beside the model: how it was made and how it wants to be asked
OF_ONE_RUN = ("output_dir", "resume_from_checkpoint", "plan")  # another run has its own
SYSTEM_PROMPT_FILE = "system_prompt.txt"  # likewise, a copy of --system_prompt


def knob(default: Any, meaning: str) -> Any:
    """A field with its default and its line of --help."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Which model, and how questions are put to it."""

    model: str = knob("auto", "preset (qwen2.5-0.5b, -1.5b, -3b, -7b, smollm2-135m), hub id or folder; auto: what fits")
    trust_remote_code: bool = knob(False, "run the Python code that a model brings along, with all your rights")
    labels: str = knob("yes,no", "answers allowed, comma-separated; add maybe to keep PubMedQA's maybe questions")
    context_field: str | None = knob(
        None, f"a record's field with the context; {NO_CONTEXT}: it has none; default: found"
    )
    question_field: str | None = knob(None, "a record's field with the question; default: found, as PubMedQA names it")
    label_field: str | None = knob(None, "a record's field with the right answer; default: found, as PubMedQA names it")
    system_prompt: str | None = knob(None, "text file, used as it stands; default: our own, which asks for the form")
    reasoning_tag: str = knob("reasoning", "the tag around the reasoning")
    answer_tag: str = knob("answer", "the tag around the answer; closing it ends a completion")
    few_shot: int = knob(0, "worked examples (yes or no, biomedical) in the prompt: 0, 1 or 2")
    prefill: bool = knob(False, "begin the answer with <reasoning> for the model")
    max_prompt_length: int = knob(768, "tokens; a longer context loses its beginning, the question never")
    max_completion_length: int = knob(300, "tokens")

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.strip() for label in self.labels.split(","))

    @property
    def field_names(self) -> dict[str, str]:
        """Which of a record's fields are its question, context and label, where that was said."""
        names = {"question": self.question_field, "context": self.context_field, "label": self.label_field}
        return {field: name for field, name in names.items() if name}

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat(self.label_names, self.reasoning_tag, self.answer_tag)

    @property
    def system_prompt_text(self) -> str:
        """What the file holds, "" where none is named; `problems` has told whether it can be read."""
        return read_system_prompt(self.system_prompt) if self.system_prompt is not None else ""

    def problems(self) -> list[str]:
        """Everything about these values that cannot work, a line each."""
        different = {label.casefold() for label in self.label_names}
        tags = {"reasoning_tag": self.reasoning_tag, "answer_tag": self.answer_tag}
        examples = len(worked_examples(self.answer_format))
        misread, fault = self._misread_labels(), self._system_prompt_fault()
        few_shot = f"few_shot is {self.few_shot}; of the yes/no ones {examples} fit labels {self.labels}: --few_shot 0"
        return [
            message
            for wrong, message in (
                (len(different) < 2 or "" in different, "labels needs two answers or more: yes,no"),
                (len(different) < len(self.label_names), f"labels is {self.labels}, which holds one answer twice"),
                *(
                    (not TAG_NAME.fullmatch(tag), f"{name} is {tag!r}; a tag is one word, without its brackets")
                    for name, tag in tags.items()
                ),
                (len(set(tags.values())) == 1, "reasoning_tag and answer_tag must differ"),
                (
                    len(set(self.field_names.values())) < len(self.field_names),
                    "question_field, context_field and label_field must name different fields",
                ),
                (bool(misread), f"labels: no answer is read as {misread}; mind full stops and tags"),
                (bool(fault), f"system_prompt is {self.system_prompt}, which {fault}"),
                (not 0 <= self.few_shot <= examples, few_shot),
                (self.max_prompt_length < 1, "max_prompt_length must be 1 or more"),
                (self.max_completion_length < 1, "max_completion_length must be 1 or more"),
            )
            if wrong
        ]

    def _system_prompt_fault(self) -> str:
        try:
            return self.system_prompt_text and ""
        except Unusable as fault:
            return str(fault)

    def _misread_labels(self) -> str:
        """Labels that the answer contract cannot tell apart; tags that are none, or one, have a line of their own."""
        tags = {self.reasoning_tag, self.answer_tag}
        if len(tags) < 2 or not all(map(TAG_NAME.fullmatch, tags)):
            return ""
        return ", ".join(repr(label) for label in self.label_names if not self.answer_format.reads_back(label))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AskConfig):
    """The questions, and which of them are held out."""

    data: str | None = knob(None, "JSON/JSONL file, hub id or sample; default: the golden 500 if here, else sample")
    eval_fraction: float = knob(0.2, "share of the questions held out for evaluation, by class")
    eval_limit: int | None = knob(None, "evaluate on this many held-out questions at most; default: all")
    generation_batch_size: int | None = knob(
        None, "completions sampled at once, in training and evaluation; default: what costs no memory on top"
    )
    seed: int = knob(0, "decides the split, the order of questions and every draw")

    def problems(self) -> list[str]:
        return super().problems() + [
            message
            for wrong, message in (
                (
                    not 0 < self.eval_fraction <= 1,
                    f"eval_fraction is {self.eval_fraction}; a share lies between 0 and 1",
                ),
                (self.eval_limit is not None and self.eval_limit < 1, "eval_limit must be 1 or more"),
                ((self.generation_batch_size or 1) < 1, "generation_batch_size must be 1 or more"),
            )
            if wrong
        ]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EvaluateConfig):
    """A training run."""

    ds: str = knob("ds_configs/zero2.json", "DeepSpeed JSON; ds_configs/README.md explains the keys")
    output_dir: str | None = knob(None, "the fine-tuned model and metrics.jsonl; default: outputs/MODEL-DATE-TIME")
    num_generations: int = knob(4, "completions a question, the G of the paper")
    batch_size: int = knob(2, "questions a step on each rank")
    temperature: float = knob(1.0, "of sampling, and of the log-probs alike")
    num_iterations: int = knob(1, "outer iterations, each with a new reference made from the policy")
    num_steps: int = knob(100, "steps an iteration")
    mu: int = knob(1, "optimizer steps on each rollout")
    beta: float = knob(0.04, "weight of the KL to the reference; 0 loads no reference")
    loss_type: LossType = knob("grpo", "grpo, dapo, dr_grpo, bnpo, gspo or cispo; formulas: docs/losses.md")
    epsilon: float = knob(0.2, "how far the ratio may fall below 1 before it is clipped; gspo wants 3e-4")
    epsilon_high: float | None = knob(None, "how far it may rise above 1 (dapo: 0.28, cispo: 4); default: epsilon")
    delta: float | None = knob(None, "bounds the ratio also where the advantage is negative, e.g. 4; default: nothing")
    kl_estimator: KlEstimator = knob("k3", "k1, k2, k3, or k3_corrected: times the ratio, unbiased in its gradient")
    scale_rewards: RewardScale = knob("group", "std that divides advantages: group, batch, none; dr_grpo leaves it")
    mask_truncated_completions: bool = knob(False, "completions cut at the length limit neither train nor count")
    dynamic_sampling: int = knob(0, "times a step may ask other questions where all rewards are equal; 0: never")
    balance_classes: bool = knob(True, "questions of each class in turn, those of a smaller class more often")
    reward_funcs: str = knob("correctness,format", f"of {', '.join(READY_MADE)}, FILE.py:FUNCTION; comma-separated")
    reward_weights: str | None = knob(None, "a factor for each of reward_funcs, comma-separated; default: 1 each")
    reward_timeout: float = knob(60.0, "seconds that a call of a reward function may take; 0: any number")
    on_reward_error: OnRewardError = knob("stop", "a reward function that fails: stop, or zero (go on without it)")
    correctness_reward: float = knob(2.0, "for the right answer in a well-formed completion")
    format_reward: float = knob(0.2, "for each of the two well-formed tag pairs")
    overlong_buffer: int = knob(0, "last tokens before the length limit that cost reward; 0: none")
    overlong_penalty: float = knob(1.0, "what a completion at the limit loses if there is an overlong_buffer")
    learning_rate: float = knob(1e-6, "of 8-bit AdamW; constant")
    weight_decay: float = knob(0.0, "of 8-bit AdamW")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm; 0 turns clipping off")
    reference: ReferenceKind = knob("auto", "int8 (auto), llm.int8, bf16, bf16-cpu; with LoRA the policy's own base")
    sync_ref_model: bool = knob(False, "move the reference towards the policy every ref_model_sync_steps steps")
    ref_model_mixup_alpha: float = knob(0.6, "alpha policy + (1 - alpha) reference; 1 remakes it; less is for bf16")
    ref_model_sync_steps: int = knob(512, "steps between two such moves")
    lora_r: int = knob(0, "rank of a LoRA adapter, trained on a frozen base; 0: train all parameters")
    lora_alpha: int = knob(32, "the adapter's update is scaled by lora_alpha / lora_r")
    lora_target: str = knob("all-linear", "layers that get one: all-linear, or names as q_proj,v_proj")
    load_in_4bit: bool = knob(False, "QLoRA: the frozen base in 4 bits (NF4), about a quarter of its memory")
    load_in_8bit: bool = knob(False, "the frozen base in 8 bits (LLM.int8), about half of its memory")
    merge_adapter: bool = knob(False, "save base and adapter as one ordinary model as well, in output_dir/merged")
    pack_tokens: int = knob(0, "tokens a backward; 0: all of a step's in one, which is fastest")
    gradient_checkpointing: bool | None = knob(
        None, "recompute activations in the backward pass; default: unless the memory plan has room for them"
    )
    cuda_graphs: bool = knob(False, "on a card, launch the kernels of a sampled token together")
    logprob_chunk_mib: float = knob(64.0, "MiB that a block of logits and its temporaries may take")
    save_steps: int = knob(50, "steps between checkpoints in output_dir/checkpoint-N, and one at the end; 0: none")
    save_total_limit: int | None = knob(2, "newest checkpoints that are kept, beside the best by eval_steps; null: all")
    eval_steps: int = knob(0, "steps between evaluations on the way; 0: before and after training alone")
    resume_from_checkpoint: str | None = knob(
        None, "a checkpoint-N folder to go on from, or auto: the newest whole one of output_dir; flags come from there"
    )
    plan: bool = knob(False, "print the memory this run would take, phase by phase, and stop")
    dry_run_worst_case: bool = knob(False, "one step of the longest prompts and completions first; changes nothing")
    preflight: bool = knob(True, "seconds of checks before the first step: gradients, log-probs, versions")
    max_bad_steps: int = knob(3, "steps in a row that may be skipped for numbers that are not finite; one more stops")
    oom_retry: bool = knob(False, "on one rank, a phase out of memory is tried again in smaller parts; same results")
    log_completions: bool = knob(False, "every completion with its rewards to completions.jsonl and the trackers")
    report_to: str = knob(
        "none", "none, or of wandb,tensorboard,trackio; a key comes from the environment, never from here"
    )

    def problems(self) -> list[str]:
        alone = (
            f"num_generations is {self.num_generations}, but an advantage compares a completion with its siblings: "
            "2 or more, e.g. --num_generations 4"
        )
        return [*super().problems(), *reward_problems(self.reward_funcs, self.reward_weights)] + [
            message
            for wrong, message in (
                (self.num_generations < 2, alone),
                (self.temperature <= 0, f"temperature is {self.temperature}; sampling needs more than 0"),
                (self.eval_fraction == 1, "eval_fraction is 1, which leaves nothing to train on"),
                (self.beta < 0, f"beta is {self.beta}; it must be 0 or more"),
                (not 0 < self.epsilon < 1, f"epsilon is {self.epsilon}; it must lie between 0 and 1"),
                (not 0 <= self.reward_timeout < MAX_TIMEOUT, "reward_timeout must be 0 or more seconds"),
                (
                    self.epsilon_high is not None and not self.epsilon_high > 0,
                    f"epsilon_high is {self.epsilon_high}; it must be more than 0",
                ),
                *self._delta_problems(),
                (
                    not 0 <= self.overlong_buffer <= self.max_completion_length,
                    f"overlong_buffer is {self.overlong_buffer}; it must lie between 0 and max_completion_length",
                ),
                (not self.overlong_penalty >= 0, "overlong_penalty must be 0 or more; it is subtracted"),
                (self.dynamic_sampling < 0, "dynamic_sampling must be 0 or more"),
                (self.max_bad_steps < 0, "max_bad_steps must be 0 or more"),
                (self.learning_rate <= 0, f"learning_rate is {self.learning_rate}; it must be more than 0"),
                (self.logprob_chunk_mib <= 0, "logprob_chunk_mib must be more than 0"),
                (self.max_grad_norm < 0, "max_grad_norm must be 0 or more"),
                (self.weight_decay < 0, "weight_decay must be 0 or more"),
                (
                    0 != self.pack_tokens < self.longest,
                    f"pack_tokens is {self.pack_tokens}, but a prompt with one completion may have {self.longest}; "
                    "0 packs all of a step together",
                ),
                *self._saving_problems(),
                *self._tracker_problems(),
                *(
                    (getattr(self, name) < 1, f"{name} must be 1 or more")
                    for name in ("batch_size", "num_steps", "num_iterations", "mu", "ref_model_sync_steps")
                ),
                *self._lora_problems(),
                *self._sync_problems(),
            )
            if wrong
        ]

    def _tracker_problems(self) -> Iterator[tuple[bool, str]]:
        unknown = [name for name in self.trackers if name not in TRACKERS]
        yield bool(unknown), f"report_to names {', '.join(unknown)}; there are: {', '.join(TRACKERS)}"
        yield "none" in self.trackers and len(self.trackers) > 1, f"report_to is {self.report_to}: none stands alone"

    def _saving_problems(self) -> Iterator[tuple[bool, str]]:
        yield self.save_steps < 0, f"save_steps is {self.save_steps}; it must be 0 (none) or more"
        yield self.eval_steps < 0, f"eval_steps is {self.eval_steps}; it must be 0 (never) or more"
        limit = self.save_total_limit
        yield limit is not None and limit < 1, f"save_total_limit is {limit}; it must be 1 or more, or null for all"
        both = self.save_steps > 0 and self.eval_steps > 0
        yield (
            both and self.save_steps % self.eval_steps != 0,
            f"save_steps is {self.save_steps}; make it a multiple of eval_steps, {self.eval_steps}: "
            "the best checkpoint is one that was evaluated",
        )

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due once `step` steps are done."""
        return self.save_steps > 0 and (step % self.save_steps == 0 or step == self.total_steps)

    def _delta_problems(self) -> list[tuple[bool, str]]:
        if self.delta is None:
            return []
        bound = 1 + self.objective.epsilon_high
        return [
            (self.loss_type == "cispo", "delta has no part in cispo, whose ratio is bounded for either sign"),
            (not self.delta > bound, f"delta is {self.delta}; it must be more than 1 + epsilon_high, {bound:g}"),
        ]

    @property
    def trackers(self) -> tuple[str, ...]:
        """What report_to names, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.report_to.split(",")))

    @property
    def objective(self) -> Objective:
        """What core/losses.py needs of these flags."""
        return Objective(
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            max_completion_length=self.max_completion_length,
        )

    def _lora_problems(self) -> Iterator[tuple[bool, str]]:
        yield self.lora_r < 0, f"lora_r is {self.lora_r}; it must be 0 (no adapter) or more"
        yield self.lora_alpha <= 0, f"lora_alpha is {self.lora_alpha}; it must be more than 0"
        yield not all(self.lora_targets), "lora_target is all-linear or names without gaps: q_proj,v_proj"
        yield self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit exclude each other"
        for name in ("load_in_4bit", "load_in_8bit", "merge_adapter"):
            yield getattr(self, name) and not self.lora_r, f"{name} is for an adapter: add --lora_r 16"
        kept = f"reference is {self.reference}, but with LoRA it is the policy's own base: leave --reference out"
        yield self.lora_r > 0 and self.reference != "auto", kept

    def _sync_problems(self) -> Iterator[tuple[bool, str]]:
        alpha = f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha:g}"
        yield not 0 < self.ref_model_mixup_alpha <= 1, f"{alpha}; it must lie above 0 and at most be 1"
        yield self.sync_ref_model and not self.beta, "sync_ref_model needs a reference, and beta 0 loads none"
        mixes, mixing = self.reference_kind in ("bf16", "bf16-cpu"), self.sync_ref_model and self.beta > 0
        if self.lora_r:
            reason = "two adapters mixed are no adapter of that rank: --ref_model_mixup_alpha 1"
        else:
            reason = "8 bits cannot be mixed, only remade: --reference bf16, or --ref_model_mixup_alpha 1"
        yield mixing and not mixes and self.ref_model_mixup_alpha < 1, f"{alpha}, but {reason}"

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.lora_target.split(","))

    @property
    def base_bits(self) -> int:
        """Bits of a weight of the frozen layers; 16 stands for the run's own precision."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    @property
    def reference_kind(self) -> str:
        """How the reference is kept: a ReferenceKind other than auto, or "adapter": the policy's own base."""
        return "adapter" if self.lora_r else "int8" if self.reference == "auto" else self.reference

    def ds_sizes(self, *, bf16: bool, world_size: int = 1) -> DsSizes:
        """What the DeepSpeed JSON needs of these flags."""
        return DsSizes(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            warmup_steps=0,
            total_steps=self.total_steps * self.mu,
            micro_batch_size=self.batch_size * self.num_generations,
            world_size=world_size,
            bf16=bf16,
        )

    @property
    def longest(self) -> int:
        """Tokens of a packed row with one completion, at most."""
        return self.max_prompt_length + self.max_completion_length - 1

    @property
    def total_steps(self) -> int:
        """Rollouts of the whole run."""
        return self.num_iterations * self.num_steps


def write_config(config: AskConfig, folder: Path) -> None:
    """The resolved config as YAML; `--config` reads it back, for a run into a folder of its own."""
    values = {knob.name: getattr(config, knob.name) for knob in fields(config) if knob.name not in OF_ONE_RUN}
    if config.system_prompt:
        values["system_prompt"] = str(folder / SYSTEM_PROMPT_FILE)
        (folder / SYSTEM_PROMPT_FILE).write_text(f"{config.system_prompt_text}\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def prompt_recipe(folder: Path) -> dict[str, Any]:
    """How a model trained by us wants to be asked: from the config saved beside it, {} without one."""
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        return {}
    try:
        values = yaml.safe_load(saved.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise UsageError(
            f"{saved} is damaged: it holds no settings. The model was trained with the prompt that stands there:\n"
            "restore it, or remove it and give --system_prompt, --labels and the tags by hand."
        )
    if values.get("system_prompt"):  # the copy, wherever the model has gone since
        values["system_prompt"] = str(folder / SYSTEM_PROMPT_FILE)
    # Whose code may run here is for the person to say, not for a file that came with a model.
    names = {knob.name for knob in fields(AskConfig)} - {"model", "trust_remote_code"}
    found = {name: values[name] for name in names if name in values}
    numbers = [knob.name for knob in fields(AskConfig) if isinstance(knob.default, int)]
    if wrong := [name for name in numbers if not isinstance(found.get(name, 0), int)]:
        raise UsageError(
            f"{saved}: {wrong[0]} is {found[wrong[0]]!r}, which is no number. Mend it, or remove the file."
        )
    return found
