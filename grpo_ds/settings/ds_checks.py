"""Checks of the DeepSpeed JSON that need no flags: unknown keys, refused values, contradictions."""

import difflib
from collections.abc import Iterator
from typing import Any

from grpo_ds.settings.ds_json import AUTO, get_value, kind, set_value
from grpo_ds.settings.ds_keys import KNOWN_KEYS, PARAMS_BY_TYPE, REFUSED

# Sections that every run has: an empty JSON still has a precision and an optimizer.
ALWAYS_OPEN = ("zero_optimization", "bf16", "optimizer", "optimizer.params")
SGD = "SGD"
OURS = ("AdamW8bit", SGD)  # optimizers that are built here and handed to DeepSpeed
OPEN_IF_GIVEN = ("zero_optimization.offload_optimizer", "scheduler", "scheduler.params", "fp16", "data_types")


def open_sections(engine: dict[str, Any]) -> Iterator[str]:
    """Create the sections that every run has; report and empty a section that is not an object."""
    for path in (*ALWAYS_OPEN, *OPEN_IF_GIVEN):
        value = get_value(engine, path)
        if value is not None and not isinstance(value, dict):
            yield f"{path} is {kind(value)}, but must be an object {{...}}"
            set_value(engine, path, {})
        elif value is None and path in ALWAYS_OPEN:
            set_value(engine, path, {})


def unknown_keys(engine: dict[str, Any]) -> Iterator[str]:
    """Report keys that DeepSpeed does not read, with a similar real key, and unsupported optimizers and schedules."""
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
        for key in (get_value(engine, section) if section else engine) or ():
            path = f"{section}.{key}" if section else key
            if key not in real and path not in refused:
                yield f"{path} is not a key DeepSpeed reads{nearest(key, section, known)}"


def nearest(key: str, section: str, known: dict[str, frozenset[str]]) -> str:
    """End of the message about an unknown key: the right section, or a key with a similar name."""
    elsewhere = next((other for other, real in known.items() if key in real), None)
    if elsewhere is not None:
        return f": it belongs in {elsewhere}" if elsewhere else ": it belongs at the top level"
    close = difflib.get_close_matches(key.lower(), known[section], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refused_values(engine: dict[str, Any]) -> Iterator[str]:
    """Report values that DeepSpeed accepts but this trainer cannot use."""
    for path, is_wrong, reason in REFUSED:
        value = get_value(engine, path)
        if value is not None and value != AUTO and is_wrong(value):
            yield f"{path} {reason}"


def check_zero(engine: dict[str, Any]) -> Iterator[str]:
    """Check stage, offload device and the keys that depend on them."""
    zero, bf16 = engine["zero_optimization"], engine["bf16"]
    stage, offload = zero.setdefault("stage", 0), offloads(engine)
    if type(stage) is int and stage == 3:
        yield "zero_optimization.stage 3 splits the weights, but sampling and the chunked head need full weights: use 2"
    elif type(stage) is not int or stage not in (0, 1, 2):
        yield f"zero_optimization.stage is {kind(stage)}; write 2 (or 1, or 0)"
    device = get_value(engine, "zero_optimization.offload_optimizer.device")
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
    """Check the keys that our optimizers depend on, and set the two that make DeepSpeed accept one."""
    if not has_our_optimizer(engine):
        return
    name = get_value(engine, "optimizer.type")
    if has_bf16_masters(engine):
        if not offloads(engine):
            yield f'bf16.bf16_master_weights_and_grads needs "offload_optimizer": {{"device": "cpu"}} with {name}'
        if engine["bf16"].get("enabled") is False and not has_fp16(engine):
            yield "bf16.bf16_master_weights_and_grads needs bf16.enabled true (auto is false: this CPU emulates bf16)"
        if engine["bf16"].get("bf16_optimizer_states") is True:
            yield "bf16.bf16_optimizer_states is for DeepSpeed's own Adam; AdamW8bit's moments take half of that"
    if get_value(engine, "optimizer.params.moments") == "companded" and not offloads(engine):
        yield 'optimizer.params.moments companded is for moments in RAM: "offload_optimizer": {"device": "cpu"}'
    if engine.setdefault("zero_allow_untested_optimizer", True) is not True:
        yield f"zero_allow_untested_optimizer must be true: {name} is not on DeepSpeed's list"
    if engine.setdefault("zero_force_ds_cpu_optimizer", False) is not False and offloads(engine):
        yield f"zero_force_ds_cpu_optimizer must be false: true forbids {name} under offload"


def check_fp16(engine: dict[str, Any]) -> Iterator[str]:
    """Check what fp16 depends on."""
    if not has_fp16(engine):
        return
    stage, fp16 = engine["zero_optimization"]["stage"], engine["fp16"]
    if type(stage) is int and stage == 0:
        yield "fp16.enabled needs ZeRO stage 1 or 2, as DeepSpeed does not scale the loss at stage 0: use 2"
    lowest, power = fp16["min_loss_scale"], fp16["initial_scale_power"]
    if type(lowest) is type(power) is int and 0 <= power <= 32 and lowest > 2**power:
        yield f"fp16.min_loss_scale is {lowest}, but fp16.initial_scale_power {power} begins below it, at {2**power}"


def has_our_optimizer(engine: dict[str, Any]) -> bool:
    return get_value(engine, "optimizer.type") in OURS


def has_bf16_masters(engine: dict[str, Any]) -> bool:
    return get_value(engine, "bf16.bf16_master_weights_and_grads") is True


def has_fp16(engine: dict[str, Any]) -> bool:
    return get_value(engine, "fp16.enabled") is True


def offloads(engine: dict[str, Any]) -> bool:
    return get_value(engine, "zero_optimization.offload_optimizer.device") == "cpu"


def leftover_autos(value: Any, path: str = "") -> Iterator[str]:
    """Report every remaining "auto"; DeepSpeed would drop it or read it as text."""
    reported_elsewhere = ("stage", "device", "type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
    if value == AUTO and path.rpartition(".")[2] not in reported_elsewhere:
        yield f'{path} is "auto", which works only for sizes that flags set: write a value or leave it out'
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leftover_autos(item, f"{path}.{key}" if path else str(key))
