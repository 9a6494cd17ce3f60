"""The DeepSpeed JSON, resolved and checked before DeepSpeed sees it.

The JSON owns what DeepSpeed executes; the flags own GRPO and data. What both need is "auto" in the JSON, or
left out, and filled here. Raw DeepSpeed would take `"bf16": {"enabled": "auto"}` for off, ignore a mistyped
top-level key and stop at the first wrong value after minutes of loading; here all that is wrong comes at once.
Standard library only: a typo is answered before torch is imported.
"""

import copy
import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ds.errors import UsageError, one_error
from grpo_ds.settings.ds_json import kind, read_json
from grpo_ds.settings.ds_keys import KNOWN_KEYS, PARAMS_BY_TYPE, REFUSED

AUTO = "auto"
SMALL_BUCKET = 25_000_000  # elements: 50 MB in bf16 where DeepSpeed's default takes 1 GB of the card


@dataclass(frozen=True, slots=True)
class DsSizes:
    """What the flags own and DeepSpeed needs too: the value typed, or the flag's default."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float  # 0 turns clipping off
    warmup_steps: int
    total_steps: int  # optimizer steps of the whole run
    micro_batch_size: int  # completions a rank trains on in one step: questions x generations
    world_size: int
    bf16: bool = True  # this machine computes in bf16; many CPUs only imitate it, up to 80 times slower than fp32


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """The optimizer asked for."""

    type: str  # "AdamW8bit" is built by us and handed in; "Adam" and "AdamW" are built by DeepSpeed
    params: dict[str, Any]  # lr, betas, eps, weight_decay, and for DeepSpeed's whatever else it takes


@dataclass(frozen=True, slots=True)
class DsConfig:
    """What deepspeed.initialize gets, and the numbers the run really uses."""

    engine: dict[str, Any]  # no "auto" left; without "optimizer" when the type is AdamW8bit
    optimizer: OptimizerSpec
    offload: bool  # optimizer states and step live in host memory
    bf16_masters: bool  # masters and gradients in bf16; AdamW8bit then keeps what bf16 cannot hold by `rounding`
    rounding: str  # "residual" or "stochastic"; means nothing to fp32 masters
    share_staging: bool  # the bf16 copy on its way to the card lies in the gradients' memory, which is free by then
    zero_stage: int  # 0, 1 or 2
    bf16: bool  # weights in bf16 (fp32 when the JSON says "enabled": false)
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    has_scheduler: bool  # DeepSpeed steps the JSON's schedule; the trainer must add none of its own


# Sections whose bare presence is implied: an empty JSON still has a precision and an optimizer.
ALWAYS_OPEN = ("zero_optimization", "bf16", "optimizer", "optimizer.params")
OPEN_IF_GIVEN = ("zero_optimization.offload_optimizer", "scheduler", "scheduler.params", "fp16", "data_types")


def resolve_ds_config(path: str | Path, *, fill: DsSizes, explicit: frozenset[str] = frozenset()) -> DsConfig:
    """The JSON at `path`, checked and with every "auto" filled.

    explicit: the names of the DsSizes fields the user typed as flags. A number in the JSON wins over a flag's
    default without a word; against a typed flag it is a contradiction.
    Raises UsageError, one for all that is wrong.
    """
    engine = read_json(Path(path))
    problems = [
        *open_sections(engine),
        *unknown_keys(engine),
        *refused_values(engine),
        *fill_fixed(engine, fill),
        *fill_rows(engine, shared_rows(fill), explicit),
        *fill_rows(engine, schedule_rows(engine, fill), explicit),
        *fill_rows(engine, adamw8bit_rows() if ours(engine) else [], explicit),
        *fill_peak(engine),
        *check_zero(engine),
        *check_optimizer(engine),
        *leftover_autos(engine),
    ]
    if problems:
        one_line_each = [" ".join(problem.split()) for problem in problems]  # a key may hold a line break
        raise one_error(UsageError, f"{path} cannot be handed to DeepSpeed:", one_line_each)
    return split(engine, fill)


# --- looking into nested sections by dotted path -----------------------------------------------------------


def look(config: dict[str, Any], path: str) -> Any:
    """The value at "a.b.c", or None where it or a section above it is absent."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def put(config: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    (look(config, section) if section else config)[key] = value


def has_section(config: dict[str, Any], path: str) -> bool:
    section = path.rpartition(".")[0]
    return not section or isinstance(look(config, section), dict)


# --- what is wrong -----------------------------------------------------------------------------------------


def open_sections(engine: dict[str, Any]) -> Iterator[str]:
    """Create the sections every run has; a section that is no object is named and emptied, so that checks go on."""
    for path in (*ALWAYS_OPEN, *OPEN_IF_GIVEN):
        value = look(engine, path)
        if value is not None and not isinstance(value, dict):
            yield f"{path} is {kind(value)}, but must be an object {{...}}"
            put(engine, path, {})
        elif value is None and path in ALWAYS_OPEN:
            put(engine, path, {})


def unknown_keys(engine: dict[str, Any]) -> Iterator[str]:
    """Keys DeepSpeed does not read, each with the nearest real one; types of optimizer and schedule not supported."""
    known = dict(KNOWN_KEYS)
    for section, params_of in PARAMS_BY_TYPE.items():
        if section not in engine:
            continue
        asked = engine[section].get("type", "AdamW8bit" if section == "optimizer" else None)
        name = next((name for name in params_of if name.lower() == str(asked).lower()), None)
        if name is None:
            given = kind(asked) if asked is not None else "missing"
            yield f"{section}.type is {given}, but must be one of {', '.join(params_of)}"
            continue
        engine[section]["type"] = name
        engine[section].setdefault("params", {})
        known[f"{section}.params"] = params_of[name]
    refused = {path for path, _, _ in REFUSED}
    for section, real in known.items():
        for key in (look(engine, section) if section else engine) or ():
            path = f"{section}.{key}" if section else key
            if key not in real and path not in refused:
                yield f"{path} is not a key DeepSpeed reads{nearest(key, section, known)}"


def nearest(key: str, section: str, known: dict[str, frozenset[str]]) -> str:
    elsewhere = next((other for other, real in known.items() if key in real), None)
    if elsewhere is not None:
        return f": it belongs in {elsewhere}" if elsewhere else ": it belongs at the top level"
    close = difflib.get_close_matches(key.lower(), known[section], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refused_values(engine: dict[str, Any]) -> Iterator[str]:
    """Values DeepSpeed would take and this trainer cannot use."""
    for path, is_wrong, reason in REFUSED:
        value = look(engine, path)
        if value is not None and value != AUTO and is_wrong(value):
            yield f"{path} {reason}"


# --- filling -----------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf


# What a value may be: how to say it, how to tell.
SWITCH = ("true or false", lambda value: isinstance(value, bool))
AMOUNT = ("a number from 0 up", lambda value: is_number(value) and value >= 0)
COUNT = ("a whole number from 1 up", lambda value: is_number(value) and value >= 1 and value == int(value))
ROUNDING = ("residual or stochastic", lambda value: value in ("residual", "stochastic"))
BETAS = (
    "two numbers below 1, such as [0.9, 0.999]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A value filled here: where, with what, what the JSON may say instead, and the flag that owns it, if any."""

    path: str
    value: Any
    allowed: tuple[str, Callable[[Any], bool]]
    flag: str = ""


def shared_rows(fill: DsSizes) -> list[Row]:
    """Everything "auto" or an omission stands for, but for batch sizes and schedule."""
    return [
        Row("optimizer.params.lr", fill.learning_rate, AMOUNT, "learning_rate"),
        Row("optimizer.params.weight_decay", fill.weight_decay, AMOUNT, "weight_decay"),
        Row("optimizer.params.betas", [0.9, 0.999], BETAS),
        Row("optimizer.params.eps", 1e-8, AMOUNT),
        Row("gradient_clipping", fill.max_grad_norm, AMOUNT, "max_grad_norm"),
        Row("bf16.enabled", fill.bf16, SWITCH),
        Row("wall_clock_breakdown", False, SWITCH),
        # On one card there is nobody to overlap with: the second bucket would only take memory.
        Row("zero_optimization.overlap_comm", False, SWITCH),
        Row("zero_optimization.reduce_bucket_size", SMALL_BUCKET, COUNT),
        Row("zero_optimization.allgather_bucket_size", SMALL_BUCKET, COUNT),
        # DeepSpeed's own default is true since 0.19.5, which page-locks every host buffer.
        Row("zero_optimization.offload_optimizer.pin_memory", False, SWITCH),
    ]


def adamw8bit_rows() -> list[Row]:
    """What our optimizer takes beside Adam's own."""
    return [
        Row("optimizer.params.rounding", "residual", ROUNDING),
        Row("optimizer.params.share_staging", True, SWITCH),
    ]


def schedule_rows(engine: dict[str, Any], fill: DsSizes) -> list[Row]:
    """The numbers of the JSON's schedule, if it has one."""
    known = PARAMS_BY_TYPE["scheduler"].get(str(look(engine, "scheduler.type")), frozenset())
    every = [
        # DeepSpeed refuses a warm-up of 0 steps and takes 1 for 2.
        Row("scheduler.params.warmup_num_steps", max(1, fill.warmup_steps), COUNT, "warmup_steps"),
        Row("scheduler.params.total_num_steps", max(1, fill.total_steps), COUNT),
        Row("scheduler.params.warmup_min_lr", 0, AMOUNT),
    ]
    return [row for row in every if row.path.rpartition(".")[2] in known]


def fill_rows(engine: dict[str, Any], rows: list[Row], explicit: frozenset[str]) -> Iterator[str]:
    """Fill what is "auto" or left out; name values of the wrong kind and numbers that contradict a typed flag."""
    for row in rows:
        given, (what, fits) = look(engine, row.path), row.allowed
        if not has_section(engine, row.path):
            continue
        if given in (None, AUTO):
            put(engine, row.path, row.value)
        elif not fits(given):
            yield f'{row.path} is {kind(given)}; write {what}, or "auto"'
        elif row.flag in explicit and given != row.value:
            yield f'{row.path} is {given}, but --{row.flag} {row.value} was given: write "auto" or drop the flag'


def fill_fixed(engine: dict[str, Any], fill: DsSizes) -> Iterator[str]:
    """Values only one number fits, because the trainer's own arithmetic rests on it."""
    per_rank, ranks = fill.micro_batch_size, fill.world_size
    for path, value, why in (
        ("train_micro_batch_size_per_gpu", per_rank, f"--batch_size x --num_generations make {per_rank}"),
        ("gradient_accumulation_steps", 1, "the trainer splits a step itself (--pack_tokens)"),
        ("train_batch_size", per_rank * ranks, f"{per_rank} completions x {ranks} ranks make {per_rank * ranks}"),
        ("gradient_allreduce_op", "sum", "the token weights of all ranks together already sum to 1"),
    ):
        given = look(engine, path)
        if given not in (None, AUTO) and (given != value or isinstance(given, bool)):
            yield f'{path} is {kind(given)}, but {why}: write "auto"'
        put(engine, path, value)


def fill_peak(engine: dict[str, Any]) -> Iterator[str]:
    """A schedule climbs to the learning rate; DeepSpeed's own default would be 0.001."""
    path, peak = "scheduler.params.warmup_max_lr", look(engine, "optimizer.params.lr")
    if "warmup_max_lr" not in PARAMS_BY_TYPE["scheduler"].get(str(look(engine, "scheduler.type")), ()):
        return
    given = look(engine, path)
    if given not in (None, AUTO, peak):
        yield f'{path} is {kind(given)}, but the learning rate is {peak}: write "auto"'
    put(engine, path, peak)


# --- relations between keys --------------------------------------------------------------------------------


def check_zero(engine: dict[str, Any]) -> Iterator[str]:
    """Stage, offload device and what hangs on them."""
    zero, bf16 = engine["zero_optimization"], engine["bf16"]
    stage, offload = zero.setdefault("stage", 0), offloads(engine)
    if type(stage) is int and stage == 3:
        yield "zero_optimization.stage 3 splits the weights, but sampling and the chunked head read them whole: use 2"
    elif type(stage) is not int or stage not in (0, 1, 2):
        yield f"zero_optimization.stage is {kind(stage)}; write 2 (or 1, or 0)"
    device = look(engine, "zero_optimization.offload_optimizer.device")
    if device == "nvme":
        yield "offload_optimizer.device nvme needs ZeRO stage 3; in stage 2 everything stays in RAM: write cpu"
    elif device not in (None, "none", "cpu"):
        yield f"zero_optimization.offload_optimizer.device is {kind(device)}; write cpu or none"
    if offload and stage == 0:
        yield "offload_optimizer needs ZeRO stage 1 or 2, but zero_optimization.stage is 0: use 2"
    if zero.get("compute_grad_norm") is False and (offload or engine["gradient_clipping"] != 0):
        yield "zero_optimization.compute_grad_norm false needs gradient_clipping 0 and no offload: remove it"
    if bf16.get("bf16_master_weights_and_grads") is True and stage == 0:
        yield "bf16.bf16_master_weights_and_grads needs ZeRO stage 1 or 2, but zero_optimization.stage is 0: use 2"
    if bf16.get("bf16_optimizer_states") is True and bf16.get("bf16_master_weights_and_grads") is not True:
        yield "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads true"


def check_optimizer(engine: dict[str, Any]) -> Iterator[str]:
    """DeepSpeed lets an optimizer of ours in with two permissions only, given here where the JSON is silent."""
    if not ours(engine):
        return
    if masters_are_bf16(engine):
        if not offloads(engine):
            yield 'bf16.bf16_master_weights_and_grads needs "offload_optimizer": {"device": "cpu"} with AdamW8bit'
        if engine["bf16"].get("enabled") is False:
            yield "bf16.bf16_master_weights_and_grads needs bf16.enabled true (auto is false: this CPU imitates bf16)"
        if engine["bf16"].get("bf16_optimizer_states") is True:
            yield "bf16.bf16_optimizer_states is for DeepSpeed's own Adam; AdamW8bit's moments take half of it"
    if engine.setdefault("zero_allow_untested_optimizer", True) is not True:
        yield "zero_allow_untested_optimizer must be true: AdamW8bit is not on DeepSpeed's list"
    if engine.setdefault("zero_force_ds_cpu_optimizer", False) is not False and offloads(engine):
        yield "zero_force_ds_cpu_optimizer must be false: true forbids AdamW8bit under offload"


def ours(engine: dict[str, Any]) -> bool:
    return look(engine, "optimizer.type") == "AdamW8bit"


def masters_are_bf16(engine: dict[str, Any]) -> bool:
    return look(engine, "bf16.bf16_master_weights_and_grads") is True


def offloads(engine: dict[str, Any]) -> bool:
    return look(engine, "zero_optimization.offload_optimizer.device") == "cpu"


def leftover_autos(value: Any, path: str = "") -> Iterator[str]:
    """Every "auto" nothing above has filled or named; DeepSpeed would drop it or take it for a text."""
    named = ("stage", "device", "type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
    if value == AUTO and path.rpartition(".")[2] not in named:
        yield f'{path} is "auto", which is filled only for sizes that flags own: write a value or leave it out'
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leftover_autos(item, f"{path}.{key}" if path else str(key))


# --- handing over ------------------------------------------------------------------------------------------


def split(engine: dict[str, Any], fill: DsSizes) -> DsConfig:
    """The checked JSON as what DeepSpeed gets and what the trainer needs to know."""
    optimizer = OptimizerSpec(type=engine["optimizer"]["type"], params=copy.deepcopy(engine["optimizer"]["params"]))
    rounding = optimizer.params.pop("rounding", "nearest")
    share_staging = optimizer.params.pop("share_staging", False) and offloads(engine)
    if optimizer.type == "AdamW8bit":  # a name DeepSpeed would look for in torch.optim
        del engine["optimizer"]
    has_scheduler = "scheduler" in engine
    return DsConfig(
        engine=engine,
        optimizer=optimizer,
        offload=offloads(engine),
        bf16_masters=masters_are_bf16(engine),
        rounding=rounding,
        share_staging=share_staging,
        zero_stage=engine["zero_optimization"]["stage"],
        bf16=engine["bf16"]["enabled"],
        learning_rate=optimizer.params["lr"],
        weight_decay=optimizer.params["weight_decay"],
        max_grad_norm=engine["gradient_clipping"],
        warmup_steps=look(engine, "scheduler.params.warmup_num_steps") if has_scheduler else fill.warmup_steps,
        has_scheduler=has_scheduler,
    )
