"""Check the DeepSpeed JSON and fill its "auto" values before DeepSpeed sees it.

The JSON has DeepSpeed's settings; the flags have GRPO's and the data's. Sizes that both need are "auto" in the JSON, or
left out, and filled here. DeepSpeed itself would read `"bf16": {"enabled": "auto"}` as off, ignore a mistyped
top-level key and stop at the first wrong value after minutes of loading; here one error names all mistakes.
Standard library only, so a mistake is reported before torch is imported.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ds.errors import UsageError, one_error
from grpo_ds.settings.ds_checks import (
    OURS,
    check_fp16,
    check_optimizer,
    check_zero,
    has_bf16_masters,
    has_fp16,
    has_our_optimizer,
    leftover_autos,
    offloads,
    open_sections,
    refused_values,
    unknown_keys,
)
from grpo_ds.settings.ds_json import AUTO, get_value, has_section, kind, read_json, set_value
from grpo_ds.settings.ds_keys import PARAMS_BY_TYPE
from grpo_ds.system.hardware import Precision

SMALL_BUCKET = 25_000_000  # elements: 50 MB of GPU memory in bf16; DeepSpeed's default takes 1 GB


@dataclass(frozen=True, slots=True)
class DsSizes:
    """Values that flags set and DeepSpeed needs: typed, or the flag's default.

    Example: the default flags on one GPU
        DsSizes(1e-6, 0.0, 1.0, warmup_steps=0, total_steps=100, micro_batch_size=8, world_size=1)
    """

    learning_rate: float
    weight_decay: float
    max_grad_norm: float  # 0: no clipping
    warmup_steps: int  # optimizer steps
    total_steps: int  # optimizer steps of the run
    micro_batch_size: int  # completions that a rank trains on in one step: questions x generations
    world_size: int
    lr_scheduler_type: str = "constant"  # transformers' name of a schedule
    native: Precision = "bf16"  # what this machine computes in; many CPUs emulate bf16, 80 times slower than fp32


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """The optimizer of the JSON."""

    type: str  # "AdamW8bit" and "SGD" are built by us and handed in; "Adam" and "AdamW" are built by DeepSpeed
    params: dict[str, Any]  # lr, weight_decay, and further ones of this type

    @property
    def ours(self) -> bool:
        """Built by us."""
        return self.type in OURS


@dataclass(frozen=True, slots=True)
class DsConfig:
    """Argument of deepspeed.initialize, and the numbers that the run really uses.

    Example: from ds_configs/zero2.json and the default flags
        DsConfig(engine={"zero_optimization": {"stage": 2, ...}, ...}, optimizer=OptimizerSpec("AdamW8bit", ...),
                 offload=True, bf16_masters=False, rounding="residual", share_staging=True, zero_stage=2, ...)
    """

    engine: dict[str, Any]  # no "auto" left; without "optimizer" when it is built by us
    optimizer: OptimizerSpec
    offload: bool  # optimizer states and step are in RAM
    bf16_masters: bool  # masters and gradients in bf16; `rounding`: how ours handles the lost bits
    rounding: str  # one of ROUNDINGS; has no effect on fp32 masters
    share_staging: bool  # the bf16 staging buffer uses the gradients' memory, which is free by then
    zero_stage: int  # 0, 1 or 2
    precision: Precision  # of weights, activations and gradients; masters are fp32, except with bf16_masters
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    total_steps: int  # optimizer steps of the run
    has_scheduler: bool  # DeepSpeed builds the JSON's schedule
    schedule: str | None  # transformers' name of the flags' schedule; None: the JSON's, or a constant rate

    @property
    def bf16(self) -> bool:
        """Weights in bf16."""
        return self.precision == "bf16"

    @property
    def half(self) -> bool:
        """Weights in 16 bits."""
        return self.precision != "fp32"


def resolve_ds_config(path: str | Path, *, fill: DsSizes, explicit: frozenset[str] = frozenset()) -> DsConfig:
    """Read the JSON at `path`, check it and fill every "auto".

    explicit: names of the DsSizes fields that were typed as flags. A number in the JSON silently replaces a flag's
    default; if it differs from a typed flag, that is an error.
    Raises one UsageError for all problems.
    """
    engine = read_json(Path(path))
    problems = [
        *open_sections(engine),
        *unknown_keys(engine),
        *refused_values(engine),
        *fill_fixed(engine, fill),
        *precision_conflicts(engine, fill),
        *fill_autos(engine, precision_values(engine, fill), explicit),
        *fill_autos(engine, shared_values(fill), explicit),
        *fill_autos(engine, optimizer_values(engine), explicit),
        *fill_autos(engine, schedule_values(engine, fill), explicit),
        *fill_peak(engine),
        *two_schedules(engine, fill, explicit),
        *check_zero(engine),
        *check_optimizer(engine),
        *check_fp16(engine),
        *leftover_autos(engine),
    ]
    if problems:
        one_line_each = [" ".join(problem.split()) for problem in problems]  # a key may hold a line break
        raise one_error(UsageError, f"{path} cannot be used by DeepSpeed:", one_line_each)
    return split(engine, fill)


def optimizer_type(path: str | Path) -> str:
    """Return the type of the optimizer in the JSON at `path`, in our spelling; "" for none or one that is unknown."""
    asked = str(get_value(read_json(Path(path)), "optimizer.type")).lower()
    return next((name for name in PARAMS_BY_TYPE["optimizer"] if name.lower() == asked), "")


# --- filling -----------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf


# Allowed values: (in words, test).
SWITCH = ("true or false", lambda value: isinstance(value, bool))
AMOUNT = ("a number from 0 up", lambda value: is_number(value) and value >= 0)
POWER = ("an integer from 0 to 32", lambda value: is_number(value) and value in range(33))
COUNT = ("an integer from 1 up", lambda value: is_number(value) and value >= 1 and value == int(value))
ROUNDINGS = ("residual", "residual8", "stochastic")
ROUNDING = (" or ".join(ROUNDINGS), lambda value: value in ROUNDINGS)
MOMENTS = ("bitsandbytes or companded", lambda value: value in ("bitsandbytes", "companded"))
BETAS = (
    "two numbers below 1, such as [0.9, 0.999]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value),
)


@dataclass(frozen=True, slots=True)
class AutoValue:
    """The value that replaces "auto" or a missing key.

    Example: AutoValue("gradient_clipping", 1.0, AMOUNT, "max_grad_norm")
    """

    path: str
    value: Any
    allowed: tuple[str, Callable[[Any], bool]]  # values that the JSON may have instead
    flag: str = ""  # the flag that sets the value, if any


def shared_values(fill: DsSizes) -> list[AutoValue]:
    """Values that every run needs, except batch sizes and schedule."""
    return [
        AutoValue("optimizer.params.lr", fill.learning_rate, AMOUNT, "learning_rate"),
        AutoValue("optimizer.params.weight_decay", fill.weight_decay, AMOUNT, "weight_decay"),
        AutoValue("gradient_clipping", fill.max_grad_norm, AMOUNT, "max_grad_norm"),
        AutoValue("wall_clock_breakdown", False, SWITCH),
        # On one GPU there is no communication to overlap: the second bucket would only take memory.
        AutoValue("zero_optimization.overlap_comm", False, SWITCH),
        AutoValue("zero_optimization.reduce_bucket_size", SMALL_BUCKET, COUNT),
        AutoValue("zero_optimization.allgather_bucket_size", SMALL_BUCKET, COUNT),
        # DeepSpeed's default since 0.19.5, true, page-locks every buffer in RAM.
        AutoValue("zero_optimization.offload_optimizer.pin_memory", False, SWITCH),
    ]


def precision_conflicts(engine: dict[str, Any], fill: DsSizes) -> Iterator[str]:
    """Report bf16 and fp16 together, and bf16 on a card that has none; open the section of fp16 on such a card."""
    bf16, fp16 = get_value(engine, "bf16.enabled"), get_value(engine, "fp16.enabled")
    if bf16 is True and fp16 is True:
        yield "bf16.enabled and fp16.enabled are both true, but weights have one precision: remove one"
    elif has_bf16_masters(engine) and (fill.native == "fp16" or fp16 is True):
        where = "fp16.enabled is true" if fp16 is True else "this card has none"
        yield f"bf16.bf16_master_weights_and_grads needs bf16, but {where}: take --ds ds_configs/zero2.json"
    elif bf16 is True and fill.native == "fp16":
        yield 'bf16.enabled is true, but this card has no bf16: write "auto", which means fp16 here'
    if fill.native == "fp16" and bf16 is not True:
        engine.setdefault("fp16", {})


def precision_values(engine: dict[str, Any], fill: DsSizes) -> list[AutoValue]:
    """The two switches; with fp16 also the numbers of its loss scale, which are DeepSpeed's defaults but for one."""
    bf16, fp16 = get_value(engine, "bf16.enabled"), get_value(engine, "fp16.enabled")
    by_machine = fp16 in (None, AUTO) and fill.native == "fp16" and bf16 is not True
    is_fp16 = fp16 is True or by_machine
    scale = [
        AutoValue("fp16.loss_scale", 0, AMOUNT),  # 0: it moves; another number stays
        AutoValue("fp16.initial_scale_power", 16, POWER),
        AutoValue("fp16.loss_scale_window", 1000, COUNT),
        # DeepSpeed's 2 would let the first overflow pass without lowering the scale, at the price of a rollout.
        AutoValue("fp16.hysteresis", 1, COUNT),
        AutoValue("fp16.consecutive_hysteresis", False, SWITCH),
        AutoValue("fp16.min_loss_scale", 1, COUNT),
    ]
    return [
        AutoValue("bf16.enabled", fill.native == "bf16" and not is_fp16, SWITCH),
        AutoValue("fp16.enabled", by_machine, SWITCH),
        *(value for value in scale if is_fp16 or get_value(engine, value.path) == AUTO),
    ]


def optimizer_values(engine: dict[str, Any]) -> list[AutoValue]:
    """Further parameters of the JSON's optimizer: Adam's and ours."""
    known = PARAMS_BY_TYPE["optimizer"].get(str(get_value(engine, "optimizer.type")), frozenset())
    every = [
        AutoValue("optimizer.params.betas", [0.9, 0.999], BETAS),
        AutoValue("optimizer.params.eps", 1e-8, AMOUNT),
        AutoValue("optimizer.params.rounding", "residual", ROUNDING),
        AutoValue("optimizer.params.moments", "bitsandbytes", MOMENTS),
        AutoValue("optimizer.params.share_staging", True, SWITCH),
    ]
    return [value for value in every if value.path.rpartition(".")[2] in known]


def schedule_values(engine: dict[str, Any], fill: DsSizes) -> list[AutoValue]:
    """Numbers of the JSON's schedule, if it has one."""
    known = PARAMS_BY_TYPE["scheduler"].get(str(get_value(engine, "scheduler.type")), frozenset())
    every = [
        # DeepSpeed refuses a warm-up of 0 steps and reads 1 as 2.
        AutoValue("scheduler.params.warmup_num_steps", max(1, fill.warmup_steps), COUNT, "warmup_steps"),
        AutoValue("scheduler.params.total_num_steps", max(1, fill.total_steps), COUNT),
        AutoValue("scheduler.params.warmup_min_lr", 0, AMOUNT),
    ]
    return [value for value in every if value.path.rpartition(".")[2] in known]


def fill_autos(engine: dict[str, Any], values: list[AutoValue], explicit: frozenset[str]) -> Iterator[str]:
    """Fill "auto" and missing values; report values of a wrong kind and numbers that contradict a typed flag."""
    for auto in values:
        given, (what, fits) = get_value(engine, auto.path), auto.allowed
        if not has_section(engine, auto.path):
            continue
        if given in (None, AUTO):
            set_value(engine, auto.path, auto.value)
        elif not fits(given):
            yield f'{auto.path} is {kind(given)}; write {what}, or "auto"'
        elif auto.flag in explicit and given != auto.value:
            yield f'{auto.path} is {given}, but --{auto.flag} {auto.value} was given: write "auto" or drop the flag'


def fill_fixed(engine: dict[str, Any], fill: DsSizes) -> Iterator[str]:
    """Set the values that the trainer's arithmetic depends on; report any other value in the JSON."""
    per_rank, ranks = fill.micro_batch_size, fill.world_size
    for path, value, why in (
        ("train_micro_batch_size_per_gpu", per_rank, f"--batch_size x --num_generations make {per_rank}"),
        ("gradient_accumulation_steps", 1, "the trainer splits a step itself (--pack_tokens)"),
        ("train_batch_size", per_rank * ranks, f"{per_rank} completions x {ranks} ranks make {per_rank * ranks}"),
        ("gradient_allreduce_op", "sum", "the token weights of all ranks together already sum to 1"),
    ):
        given = get_value(engine, path)
        if given not in (None, AUTO) and (given != value or isinstance(given, bool)):
            yield f'{path} is {kind(given)}, but {why}: write "auto"'
        set_value(engine, path, value)


def fill_peak(engine: dict[str, Any]) -> Iterator[str]:
    """Set a schedule's peak to the learning rate; DeepSpeed's default is 0.001."""
    path, peak = "scheduler.params.warmup_max_lr", get_value(engine, "optimizer.params.lr")
    if "warmup_max_lr" not in PARAMS_BY_TYPE["scheduler"].get(str(get_value(engine, "scheduler.type")), ()):
        return
    given = get_value(engine, path)
    if given not in (None, AUTO, peak):
        yield f'{path} is {kind(given)}, but the learning rate is {peak}: write "auto"'
    set_value(engine, path, peak)


def two_schedules(engine: dict[str, Any], fill: DsSizes, explicit: frozenset[str]) -> Iterator[str]:
    """Report a schedule that was typed beside one of the JSON, which replaces a recipe's."""
    if "scheduler" in engine and "lr_scheduler_type" in explicit:
        yield f"scheduler is in it, but --lr_scheduler_type {fill.lr_scheduler_type} was given: keep one"


# --- result ------------------------------------------------------------------------------------------------


def split(engine: dict[str, Any], fill: DsSizes) -> DsConfig:
    """Split the checked JSON into DeepSpeed's dict and the values that the trainer needs."""
    optimizer = OptimizerSpec(type=engine["optimizer"]["type"], params=copy.deepcopy(engine["optimizer"]["params"]))
    rounding = optimizer.params.pop("rounding", "nearest")
    share_staging = optimizer.params.pop("share_staging", False) and offloads(engine)
    if optimizer.params.get("moments") == "bitsandbytes":  # left out, as in the checkpoints of older versions
        del optimizer.params["moments"]
    if has_our_optimizer(engine):  # DeepSpeed would look for its name in torch.optim
        del engine["optimizer"]
    has_scheduler = "scheduler" in engine
    return DsConfig(
        engine=engine,
        optimizer=optimizer,
        offload=offloads(engine),
        bf16_masters=has_bf16_masters(engine),
        rounding=rounding,
        share_staging=share_staging,
        zero_stage=engine["zero_optimization"]["stage"],
        precision="fp16" if has_fp16(engine) else "bf16" if engine["bf16"]["enabled"] else "fp32",
        learning_rate=optimizer.params["lr"],
        weight_decay=optimizer.params["weight_decay"],
        max_grad_norm=engine["gradient_clipping"],
        warmup_steps=get_value(engine, "scheduler.params.warmup_num_steps") if has_scheduler else fill.warmup_steps,
        total_steps=fill.total_steps,
        has_scheduler=has_scheduler,
        schedule=None if has_scheduler else schedule_of(fill),
    )


def schedule_of(fill: DsSizes) -> str | None:
    """Return transformers' name of the flags' schedule; None for a rate that never changes."""
    if fill.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return "constant_with_warmup" if fill.warmup_steps else None
    return fill.lr_scheduler_type
