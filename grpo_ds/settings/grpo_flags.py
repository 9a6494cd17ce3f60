"""Flags of GRPO: rollouts, rewards, loss, optimizer, reference. Names are TRL's if TRL has the flag."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from grpo_ds.core.objective import AnswerReward, KlEstimator, LossType, RewardAggregation, RewardScale
from grpo_ds.settings.flags import Flags, failed, flag, list_flag, path_flag
from grpo_ds.settings.paths import absolute_reward_files
from grpo_ds.settings.shipped import DS_JSONS
from grpo_ds.task.own_rewards import CompletionFormat
from grpo_ds.task.reward_files import reward_problems
from grpo_ds.task.rewards import READY_MADE
from grpo_ds.task.scoring import OnRewardError

LrSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]  # names of transformers
ReferenceKind = Literal["auto", "int8", "streamed", "llm.int8", "bf16", "bf16-cpu"]
CLIPPED = ("grpo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo")
SAPO = ("sapo_temperature_pos", "sapo_temperature_neg")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
# flag -> loss types that read it; with others a value of one's own is refused
READ_BY = {
    "epsilon": (*CLIPPED, "cispo"),
    "epsilon_high": (*CLIPPED, "cispo"),
    "delta": CLIPPED,
    **dict.fromkeys(SAPO, ("sapo",)),
    **dict.fromkeys(VESPO, ("vespo",)),
}
MAX_TIMEOUT = 1e6  # seconds, twelve days: an alarm takes no more seconds than an int can hold


@dataclass(frozen=True, kw_only=True)
class RolloutFlags(Flags):
    """Questions and completions of a step, and the number of steps."""

    heading: ClassVar[str] = "rollouts"

    num_generations: int = flag(4, "completions per question, the G of the paper")
    batch_size: int = flag(2, "questions per step on each rank")
    temperature: float = flag(1.0, "temperature of sampling and of the log-probs")
    num_steps: int = flag(100, "steps per outer iteration")
    max_steps: int | None = flag(None, "TRL's name for num_steps; not with num_iterations")
    num_train_epochs: float | None = flag(None, "passes over the training questions; sets num_steps")
    num_iterations: int = flag(1, "outer iterations, each with a new reference made from the policy")
    balance_classes: bool = flag(True, "take questions of each class in turn; those of a small class come more often")
    dynamic_sampling: int = flag(0, "maximum times that a step replaces questions whose rewards are all equal")

    @property
    def total_steps(self) -> int:
        """Steps (rollouts) of the run."""
        return self.num_iterations * self.num_steps

    def problems(self) -> list[str]:
        alone = (
            f"num_generations is {self.num_generations}, but an advantage compares completions of a group: "
            "2 or more, e.g. --num_generations 4"
        )
        return [
            *failed(
                (self.num_generations < 2, alone),
                (self.temperature <= 0, f"temperature is {self.temperature}; sampling needs more than 0"),
                *(
                    (getattr(self, name) < 1, f"{name} must be 1 or more")
                    for name in ("batch_size", "num_steps", "num_iterations")
                ),
                (self.dynamic_sampling < 0, "dynamic_sampling must be 0 or more"),
                (
                    self.num_train_epochs is not None and not self.num_train_epochs > 0,
                    f"num_train_epochs is {self.num_train_epochs}; it must be more than 0",
                ),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class RewardFlags(Flags):
    """Reward functions and their sizes."""

    heading: ClassVar[str] = "rewards"

    reward_funcs: str = list_flag(
        "correctness,format",
        f"comma-separated: {', '.join(READY_MADE)}, FILE.py:FUNCTION, module.FUNCTION",
        path=absolute_reward_files,
    )
    reward_weights: str | None = list_flag(None, "a factor for each of reward_funcs, comma-separated; default: 1 each")
    completion_format: CompletionFormat = flag(
        "auto", "completions of your own functions as texts or as lists of messages; auto: as each one reads them"
    )
    reward_timeout: float = flag(60.0, "seconds that a call of a reward function may take; 0: no limit")
    on_reward_error: OnRewardError = flag("stop", "if a reward function fails; zero: continue without its rewards")
    answer_reward: AnswerReward = flag(
        "auto", "correctness of the answer that was drawn, or its expectation over all labels; auto: where it can be"
    )
    correctness_reward: float = flag(2.0, "reward for the correct answer in a well-formed completion")
    format_reward: float = flag(0.2, "reward for each of the two tag pairs that is well-formed")
    overlong_buffer: int = flag(0, "tokens before the length limit in which a completion loses reward; 0: none")
    overlong_penalty: float = flag(1.0, "with overlong_buffer: reward that a completion loses at the limit")

    def problems(self) -> list[str]:
        return [
            *reward_problems(self.reward_funcs, self.reward_weights),
            *failed(
                (not 0 <= self.reward_timeout < MAX_TIMEOUT, "reward_timeout must be 0 or more seconds"),
                (not self.overlong_penalty >= 0, "overlong_penalty must be 0 or more; it is subtracted"),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class LossFlags(Flags):
    """The loss: docs/losses.md."""

    heading: ClassVar[str] = "loss"

    loss_type: LossType = flag("grpo", "surrogate and normalisation; formulas: docs/losses.md")
    epsilon: float = flag(0.2, "clip the ratio below 1 - epsilon; gspo needs about 3e-4")
    epsilon_high: float | None = flag(None, "clip it above 1 + epsilon_high (dapo: 0.28, cispo: 4); default: epsilon")
    delta: float | None = flag(None, "upper bound of the ratio if the advantage is negative, e.g. 4; default: none")
    sapo_temperature_pos: float = flag(1.0, "sapo: how fast its gate closes for tokens of positive advantage")
    sapo_temperature_neg: float = flag(1.05, "sapo: how fast it closes for other tokens")
    vespo_k_pos: float = flag(2.0, "vespo: power of the sequence's ratio where the advantage is not negative")
    vespo_lambda_pos: float = flag(3.0, "vespo: its decay there")
    vespo_k_neg: float = flag(3.0, "vespo: power of the sequence's ratio where the advantage is negative")
    vespo_lambda_neg: float = flag(2.0, "vespo: its decay there")
    beta: float = flag(0.04, "weight of the KL to the reference; 0 loads no reference")
    kl_estimator: KlEstimator = flag(
        "k3", "estimator of the KL; k3_corrected is k3 times the ratio, with an unbiased gradient"
    )
    entropy_coef: float = flag(0.0, "weight of the mean entropy per token, which the loss subtracts; 0: none")
    top_entropy_quantile: float = flag(
        1.0, "share of the step's tokens, by entropy, that learn from the advantage, e.g. 0.2; 1: all"
    )
    scale_rewards: RewardScale = flag(
        "group", "std that divides advantages: of the group, of the batch, or none (Dr. GRPO)"
    )
    multi_objective_aggregation: RewardAggregation = flag(
        "sum_then_normalize", "advantages of the sum of rewards, or the sum of each reward's own advantages (GDPO)"
    )
    mask_truncated_completions: bool = flag(False, "leave completions cut at the length limit out of the loss")

    @property
    def upper_epsilon(self) -> float:
        """epsilon_high; epsilon if it is not given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def problems(self) -> list[str]:
        delta, bound = self.delta, 1 + self.upper_epsilon
        return [
            *failed(
                (self.beta < 0, f"beta is {self.beta}; it must be 0 or more"),
                (
                    not 0 <= self.top_entropy_quantile <= 1,
                    f"top_entropy_quantile is {self.top_entropy_quantile:g}; it must be a share between 0 and 1",
                ),
                (not 0 < self.epsilon < 1, f"epsilon is {self.epsilon}; it must be between 0 and 1"),
                (
                    self.epsilon_high is not None and not self.epsilon_high > 0,
                    f"epsilon_high is {self.epsilon_high}; it must be more than 0",
                ),
                *(
                    (
                        getattr(self, name) != getattr(LossFlags, name) and self.loss_type not in kinds,
                        f"{name} has no effect with {self.loss_type}: leave it out",
                    )
                    for name, kinds in READ_BY.items()
                ),
                *(
                    (not getattr(self, name) > 0, f"{name} is {getattr(self, name):g}; it must be more than 0")
                    for name in (*SAPO, *VESPO)
                ),
                (
                    delta is not None and not delta > bound,
                    f"delta is {delta}; it must be more than 1 + epsilon_high, {bound:g}",
                ),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags(Flags):
    """Optimizer; the DeepSpeed JSON has its other settings."""

    heading: ClassVar[str] = "optimizer"

    ds: str = path_flag(
        "ds_configs/zero2.json", "DeepSpeed JSON: a file, or the name of a shipped one", path=DS_JSONS.setting
    )
    learning_rate: float = flag(1e-6, "learning rate; without a schedule it is constant")
    lr_scheduler_type: LrSchedule = flag(
        "constant", "how the rate changes behind the warm-up; linear, cosine: down to 0"
    )
    warmup_steps: int = flag(0, "updates in which the rate grows from 0")
    warmup_ratio: float = flag(0.0, "the same as a share of all updates")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: no clipping")
    mu: int = flag(1, "optimizer steps on each rollout")

    @property
    def depends_on_length(self) -> bool:
        """True if the number of steps decides the learning rate."""
        return self.lr_scheduler_type in ("linear", "cosine") or self.warmup_ratio > 0

    def problems(self) -> list[str]:
        return [
            *failed(
                (self.learning_rate <= 0, f"learning_rate is {self.learning_rate}; it must be more than 0"),
                (self.weight_decay < 0, "weight_decay must be 0 or more"),
                (self.warmup_steps < 0, "warmup_steps must be 0 or more"),
                (not 0 <= self.warmup_ratio <= 1, "warmup_ratio must be a share between 0 and 1"),
                (self.warmup_steps > 0 < self.warmup_ratio, "warmup_steps and warmup_ratio exclude each other"),
                (self.max_grad_norm < 0, "max_grad_norm must be 0 or more"),
                (self.mu < 1, "mu must be 1 or more"),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class ReferenceFlags(Flags):
    """Frozen model that the KL compares the policy with."""

    heading: ClassVar[str] = "reference"

    reference: ReferenceKind = flag("auto", "how the reference is kept; auto: int8, or with LoRA the policy's own base")
    sync_ref_model: bool = flag(False, "move the reference towards the policy every ref_model_sync_steps steps")
    ref_model_mixup_alpha: float = flag(
        0.6, "a move gives alpha policy + (1 - alpha) reference; less than 1 needs a bf16 reference"
    )
    ref_model_sync_steps: int = flag(512, "steps between two moves of the reference")

    def problems(self) -> list[str]:
        alpha = f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha:g}; it must be above 0 and at most 1"
        return [
            *failed(
                (not 0 < self.ref_model_mixup_alpha <= 1, alpha),
                (self.ref_model_sync_steps < 1, "ref_model_sync_steps must be 1 or more"),
            ),
            *super().problems(),
        ]
