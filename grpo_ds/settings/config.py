"""The config of a command: AskConfig, EvaluateConfig and TrainConfig, each made of groups of flags.

data_flags.py, grpo_flags.py and run_flags.py have the flags, defaults and checks of one group; checks and sizes that
concern several groups are here. command_line.py makes the command line and YAML (`--config FILE`) from these classes.
A preset's recipe (models/presets.py) replaces defaults, never typed flags.
Nothing heavy is imported here, so `--help` and a mistyped flag are answered at once.
"""

import math
from dataclasses import dataclass
from typing import Any

from grpo_ds.core.objective import Objective
from grpo_ds.settings.data_flags import DataFlags, ModelFlags, PromptFlags, RecordFlags
from grpo_ds.settings.ds_config import DsSizes
from grpo_ds.settings.flags import failed
from grpo_ds.settings.grpo_flags import LossFlags, OptimizerFlags, ReferenceFlags, RewardFlags, RolloutFlags
from grpo_ds.settings.run_flags import AdapterFlags, MemoryFlags, OutputFlags, SafetyFlags, SamplingFlags
from grpo_ds.system.hardware import Precision
from grpo_ds.task.answers import TAG_NAME, AnswerFormat
from grpo_ds.task.rewards import BARE_LABEL, CORRECTNESS, REASONING_GAIN
from grpo_ds.task.spelling import label_key
from grpo_ds.task.worked_examples import worked_examples


@dataclass(frozen=True, kw_only=True)
class AskConfig(ModelFlags, RecordFlags, PromptFlags):
    """A model, and the prompt that asks it a question."""

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat(self.label_names, self.reasoning_tag, self.answer_tag, self.answers, self.unit_names)

    @property
    def prompting(self) -> dict[str, Any]:
        """Arguments of task/prompts.py that say how a chat is built."""
        return {
            "answer_format": self.answer_format,
            "few_shot": self.few_shot,
            "system_prompt": self.system_prompt_text,
            "subject": self.subject or "",
        }

    def problems(self) -> list[str]:
        examples = len(worked_examples(self.answer_format))
        unread = self._unread_labels()
        exist = f"{examples} worked examples exist for answers {self.answers}"
        few_shot = f"few_shot is {self.few_shot}, but {exist}: --few_shot {examples}"
        prefill = "prefill begins an answer in tags, but answers is none: leave it out"
        return [
            *super().problems(),
            *failed(
                (bool(unread), f"labels: the answer {unread} would not be recognised; avoid full stops and tags"),
                (not 0 <= self.few_shot <= examples, few_shot),
                (self.prefill and self.answers == "none", prefill),
            ),
        ]

    def reward_checks(self, reward_funcs: str) -> list[tuple[bool, str]]:
        """Checks of rewards that need another kind of answer."""
        named, closed = [name.strip() for name in reward_funcs.split(",")], self.answers == "labels"
        of_labels = " and ".join(name for name in (REASONING_GAIN, BARE_LABEL) if name in named)
        return [
            (
                not closed and bool(of_labels),
                f"reward_funcs has {of_labels}, for labels alone, but answers is {self.answers}",
            ),
            (
                self.answers == "none" and CORRECTNESS in named,
                "reward_funcs has correctness, but answers is none: name rewards of your own, FILE.py:FUNCTION",
            ),
        ]

    def _unread_labels(self) -> str:
        """Labels that no answer can be read as; "" if tags are wrong or a label is there twice, a separate problem."""
        tags = {self.reasoning_tag, self.answer_tag}
        twice = len(set(map(label_key, self.label_names))) < len(self.label_names)
        if self.answers != "labels" or twice or len(tags) < 2 or not all(map(TAG_NAME.fullmatch, tags)):
            return ""
        return ", ".join(repr(label) for label in self.label_names if not self.answer_format.reads_back(label))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataFlags, AskConfig, SamplingFlags):
    """A model, and the questions to evaluate it on."""

    def problems(self) -> list[str]:
        misled = f"eval_misled claims another label, but answers is {self.answers}: leave it out"
        votes = "eval_samples counts votes for an answer, but answers is none: leave it out"
        return [
            *super().problems(),
            *failed(
                (self.eval_misled and self.answers != "labels", misled),
                (self.eval_samples > 0 and self.answers == "none", votes),
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    EvaluateConfig,
    RolloutFlags,
    RewardFlags,
    LossFlags,
    OptimizerFlags,
    ReferenceFlags,
    AdapterFlags,
    MemoryFlags,
    OutputFlags,
    SafetyFlags,
):
    """A training run."""

    def problems(self) -> list[str]:
        return [
            *super().problems(),
            *failed(
                (self.eval_fraction == 1, "eval_fraction is 1, which leaves nothing to train on"),
                (
                    not 0 <= self.overlong_buffer <= self.max_completion_length,
                    f"overlong_buffer is {self.overlong_buffer}; it must be between 0 and max_completion_length, "
                    f"{self.max_completion_length}",
                ),
                (
                    0 != self.pack_tokens < self.longest,
                    f"pack_tokens is {self.pack_tokens}, but a prompt with one completion may have {self.longest}; "
                    "0: the complete step in one batch",
                ),
                *self.reward_checks(self.reward_funcs),
                (
                    self.answers != "labels" and self.answer_reward == "expected",
                    f"answer_reward expected needs labels, but answers is {self.answers}: leave it out",
                ),
                *self._adapter_checks(),
                *self._reference_checks(),
                *self._aggregation_checks(),
            ),
        ]

    def _adapter_checks(self) -> list[tuple[bool, str]]:
        """Checks of flags that need an adapter; a resumed run cannot begin to train one."""
        started = "this run was started without one and trains all parameters, so leave it out"
        remedy = started if self.resume_from_checkpoint else "add --lora_r 16"
        return [
            (getattr(self, name) and not self.lora_r, f"{name} is for an adapter: {remedy}")
            for name in ("load_in_4bit", "load_in_8bit", "merge_adapter")
        ]

    def _reference_checks(self) -> list[tuple[bool, str]]:
        """Checks of the reference together with LoRA and beta."""
        mixes, mixing = self.reference_kind in ("bf16", "bf16-cpu"), self.sync_ref_model and self.beta > 0
        if self.lora_r:
            reason = "a mix of two adapters is no adapter of that rank: --ref_model_mixup_alpha 1"
        else:
            kind = "weights on disk" if self.reference_kind == "streamed" else "8 bits"
            reason = f"{kind} cannot be mixed, only made again: --reference bf16, or --ref_model_mixup_alpha 1"
        return [
            (
                self.lora_r > 0 and self.reference != "auto",
                f"reference is {self.reference}, but with LoRA it is the policy's own base: leave --reference out",
            ),
            (self.sync_ref_model and not self.beta, "sync_ref_model needs a reference, and beta 0 loads none"),
            (
                mixing and not mixes and self.ref_model_mixup_alpha < 1,
                f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha:g}, but {reason}",
            ),
        ]

    def _aggregation_checks(self) -> list[tuple[bool, str]]:
        """Checks of flags that GDPO does not read: it divides each reward by its own deviation."""
        decoupled = self.multi_objective_aggregation == "normalize_then_sum"
        remedies = {
            "scale_rewards": "leave it out",
            "answer_reward": "leave one of them out",
            "correctness_reward": "weigh it by --reward_weights",
            "format_reward": "weigh it by --reward_weights",
        }
        return [
            (
                decoupled and getattr(self, name) != getattr(TrainConfig, name),
                f"{name} {getattr(self, name)} has no effect with normalize_then_sum: {remedy}",
            )
            for name, remedy in remedies.items()
        ]

    def saves_at(self, step: int) -> bool:
        """True if a checkpoint is due after `step` steps."""
        return self.save_steps > 0 and (step % self.save_steps == 0 or step == self.total_steps)

    @property
    def objective(self) -> Objective:
        """Settings that core/losses.py needs."""
        return Objective(
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.upper_epsilon,
            delta=self.delta,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
            top_entropy_quantile=self.top_entropy_quantile,
            max_completion_length=self.max_completion_length,
        )

    @property
    def reference_kind(self) -> str:
        """Kind of the reference: a ReferenceKind other than auto, or "adapter", the policy's own base."""
        return "adapter" if self.lora_r else "int8" if self.reference == "auto" else self.reference

    def ds_sizes(self, *, native: Precision, world_size: int = 1) -> DsSizes:
        """Sizes that the DeepSpeed JSON takes from the flags, and what this machine computes in (see DsSizes)."""
        updates = self.total_steps * self.mu
        return DsSizes(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            warmup_steps=self.warmup_steps or math.ceil(self.warmup_ratio * updates),
            total_steps=updates,
            lr_scheduler_type=self.lr_scheduler_type,
            micro_batch_size=self.batch_size * self.num_generations,
            world_size=world_size,
            native=native,
        )
