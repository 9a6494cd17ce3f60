"""Every knob of a run, one line each; command line and YAML (`--config FILE`) are made from it.

Names are TRL's where TRL has them. A preset's recipe (models/presets.py) replaces defaults, never what
was typed. Nothing heavy is imported here: --help and a mistyped flag are answered at once.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from grpo_ds.ds_config import DsSizes
from grpo_ds.errors import UsageError, one_error

ReferenceKind = Literal["auto", "int8", "llm.int8", "bf16", "bf16-cpu"]
ConfigType = TypeVar("ConfigType", bound="AskConfig")
TRACKERS = ("none", "wandb")
CONFIG_FILE = "grpo_config.yaml"  # written beside the model: how it was made and how it wants to be asked


def knob(default: Any, meaning: str) -> Any:
    """A field with its default and its line of --help."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Which model, and how questions are put to it."""

    model: str = knob("auto", "preset (qwen2.5-0.5b, -1.5b, -3b, -7b, smollm2-135m), hub id or folder; auto: what fits")
    labels: str = knob("yes,no", "answers allowed, comma-separated; add maybe to keep PubMedQA's maybe questions")
    few_shot: int = knob(0, "worked examples in the prompt: 0, 1 or 2")
    prefill: bool = knob(False, "begin the answer with <reasoning> for the model")
    max_prompt_length: int = knob(768, "tokens; a longer context loses its beginning, the question never")
    max_completion_length: int = knob(300, "tokens")

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.strip().lower() for label in self.labels.split(","))

    def problems(self) -> list[str]:
        """Everything about these values that cannot work, a line each."""
        return [
            message
            for wrong, message in (
                (len(set(self.label_names)) < 2 or "" in self.label_names, "labels needs two answers or more: yes,no"),
                (self.few_shot not in (0, 1, 2), f"few_shot is {self.few_shot}; there are 2 worked examples"),
                (self.max_prompt_length < 1, "max_prompt_length must be 1 or more"),
                (self.max_completion_length < 1, "max_completion_length must be 1 or more"),
            )
            if wrong
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AskConfig):
    """The questions, and which of them are held out."""

    data: str | None = knob(None, "JSON/JSONL file, hub id or sample; default: the golden 500 if here, else sample")
    eval_fraction: float = knob(0.2, "share of the questions held out for evaluation, by class")
    eval_limit: int | None = knob(None, "evaluate on this many held-out questions at most; default: all")
    eval_batch_size: int = knob(8, "questions answered at a time in evaluation")
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
                (self.eval_batch_size < 1, "eval_batch_size must be 1 or more"),
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
    epsilon: float = knob(0.2, "how far the ratio may move from 1 before it is clipped")
    correctness_reward: float = knob(2.0, "for the right answer in a well-formed completion")
    format_reward: float = knob(0.2, "for each of the two well-formed tag pairs")
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
    micro_groups: int = knob(0, "questions a backward; 0: all of a step in one, which is fastest")
    gradient_checkpointing: bool = knob(True, "recompute activations in the backward pass")
    logprob_chunk_mib: float = knob(64.0, "MiB that a block of logits and its temporaries may take")
    plan: bool = knob(False, "print the memory this run would take, phase by phase, and stop")
    dry_run_worst_case: bool = knob(False, "one step of the longest prompts and completions first; changes nothing")
    oom_retry: bool = knob(False, "on one rank, a phase out of memory is tried again in smaller parts; same results")
    report_to: str = knob("none", "none or wandb; the key comes from WANDB_API_KEY or wandb login, never from here")

    def problems(self) -> list[str]:
        alone = (
            f"num_generations is {self.num_generations}, but an advantage compares a completion with its siblings: "
            "2 or more, e.g. --num_generations 4"
        )
        trackers = [name for name in self.report_to.split(",") if name not in TRACKERS]
        return super().problems() + [
            message
            for wrong, message in (
                (self.num_generations < 2, alone),
                (self.temperature <= 0, f"temperature is {self.temperature}; sampling needs more than 0"),
                (self.eval_fraction == 1, "eval_fraction is 1, which leaves nothing to train on"),
                (self.beta < 0, f"beta is {self.beta}; it must be 0 or more"),
                (not 0 < self.epsilon < 1, f"epsilon is {self.epsilon}; it must lie between 0 and 1"),
                (self.learning_rate <= 0, f"learning_rate is {self.learning_rate}; it must be more than 0"),
                (self.logprob_chunk_mib <= 0, "logprob_chunk_mib must be more than 0"),
                (self.max_grad_norm < 0, "max_grad_norm must be 0 or more"),
                (self.weight_decay < 0, "weight_decay must be 0 or more"),
                (self.micro_groups < 0, "micro_groups must be 0 or more"),
                (bool(trackers), f"report_to names {', '.join(trackers)}; there are: {', '.join(TRACKERS)}"),
                *(
                    (getattr(self, name) < 1, f"{name} must be 1 or more")
                    for name in ("batch_size", "num_steps", "num_iterations", "mu", "ref_model_sync_steps")
                ),
                *self._lora_problems(),
                *self._sync_problems(),
            )
            if wrong
        ]

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
    def total_steps(self) -> int:
        """Rollouts of the whole run."""
        return self.num_iterations * self.num_steps


@dataclass(frozen=True)
class Parsed(Generic[ConfigType]):
    """What the command line and its YAML file said."""

    config: ConfigType
    typed: frozenset[str]  # names given by the person, not by a default or a recipe
    extra: dict[str, str | None]  # the script's own flags


def parse(
    config_type: type[ConfigType],
    argv: list[str],
    *,
    about: str,
    recipe: Mapping[str, Any] | None = None,
    extra: dict[str, str] | None = None,
) -> Parsed[ConfigType]:
    """argv -> a checked config. Raises UsageError, one for all that is wrong.

    recipe: defaults that suit the model. extra: flags of one script alone, name -> meaning, strings.
    """
    names = {knob.name for knob in fields(config_type)}
    parser = _parser(config_type, about, {k: v for k, v in (recipe or {}).items() if k in names}, extra or {})
    _check_names(argv, {*names, *(extra or {}), "config", "local_rank", "help"})
    try:
        values = parser.parse_args(argv).as_dict()
        typed = parser.parse_args(argv, defaults=False).as_dict()
    except (ArgumentError, ValueError, OSError) as error:
        raise UsageError(_shortened(str(error))) from None
    config = config_type(**{name: values[name] for name in names})
    if problems := config.problems():
        raise one_error(UsageError, "These settings cannot work:", problems)
    return Parsed(config, frozenset(typed) & names, {name: values[name] for name in extra or {}})


def write_config(config: AskConfig, folder: Path) -> None:
    """The resolved config as YAML; `--config` reads it back."""
    values = {knob.name: getattr(config, knob.name) for knob in fields(config)}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def prompt_recipe(folder: Path) -> dict[str, Any]:
    """How a model trained by us wants to be asked: from the config saved beside it, {} without one."""
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        return {}
    values = yaml.safe_load(saved.read_text(encoding="utf-8"))
    return {knob.name: values[knob.name] for knob in fields(AskConfig) if knob.name in values and knob.name != "model"}


def _parser(config_type: type, about: str, recipe: dict[str, Any], extra: dict[str, str]) -> ArgumentParser:
    parser = ArgumentParser(description=about, exit_on_error=False, allow_abbrev=False, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below")
    parser.add_argument("--local_rank", type=int, default=0, help="==SUPPRESS==")  # the deepspeed launcher adds it
    for name, meaning in extra.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=meaning)
    for knob in fields(config_type):
        default = recipe.get(knob.name, knob.default)
        switch: dict[str, Any] = {"nargs": "?", "const": True} if knob.type is bool else {}
        parser.add_argument(f"--{knob.name}", type=knob.type, default=default, help=knob.metadata["help"], **switch)
    return parser


def _check_names(argv: list[str], known: set[str]) -> None:
    """A mistyped flag names the nearest real one; all of them in one error."""
    given = [word[2:].split("=")[0] for word in argv if word.startswith("--") and len(word) > 2]
    problems = []
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            problems.append(f"--{name}: did you mean --{close[0]}?" if close else f"--{name} is no flag of this script")
    if problems:
        raise one_error(UsageError, "Unknown flags:", problems, "--help lists them all.")


def _shortened(message: str) -> str:
    """jsonargparse's message in five lines, with the choices of a Literal in plain words."""
    if "Literal" in message or "reference" in message:
        message = message.replace(str(ReferenceKind), " | ".join(get_args(ReferenceKind)))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "\n".join([*(line[:200] for line in lines[:5]), "--help lists every flag and its default."])
