"""The DeepSpeed JSON is checked and filled before DeepSpeed sees it."""

import copy
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.settings.ds_config import DsSizes, optimizer_type, resolve_ds_config
from grpo_ds.settings.ds_keys import KNOWN_KEYS, PARAMS_BY_TYPE

SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"
SIZES = DsSizes(
    learning_rate=2e-5, weight_decay=0.01, max_grad_norm=1.0, warmup_steps=3, total_steps=40,
    micro_batch_size=8, world_size=1,
)  # fmt: skip
DEEPSPEED_RAISES = (AssertionError, ValueError, TypeError)


@pytest.fixture
def resolve(tmp_path):
    """Function that resolves a text, or an object written as JSON."""

    def run(config, *, fill=SIZES, typed=()):
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return resolve_ds_config(path, fill=fill, explicit=frozenset(typed))

    return run


def zero2(changes: dict | None = None) -> dict:
    """The shipped default with values set at dotted paths; a missing section is created."""
    config = json.loads((SHIPPED / "zero2.json").read_text())
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return config


def message_of(resolve, config, **options) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(config, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) <= MAX_LINES, message
    return message


def deepspeed_config(engine: dict):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(copy.deepcopy(engine))


# --- shipped files work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "offload"), [("zero2.json", True), ("zero2_gpu.json", False)])
def test_a_shipped_file_resolves_to_what_deepspeed_accepts(name, offload):
    config = resolve_ds_config(SHIPPED / name, fill=SIZES)
    assert "auto" not in json.dumps(config.engine)
    assert (config.offload, config.zero_stage, config.bf16, config.has_scheduler) == (offload, 2, True, False)
    assert config.optimizer.type == "AdamW8bit" and "optimizer" not in config.engine
    assert config.optimizer.params == {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}

    accepted = deepspeed_config(config.engine)
    assert accepted.train_batch_size == accepted.train_micro_batch_size_per_gpu == 8
    assert accepted.gradient_accumulation_steps == 1
    assert accepted.gradient_allreduce_op == "sum"
    assert accepted.gradient_clipping == 1.0
    assert accepted.bfloat16_config.enabled
    assert accepted.zero_allow_untested_optimizer
    assert accepted.zero_config.reduce_bucket_size == 25_000_000
    assert accepted.zero_config.overlap_comm is False
    if offload:
        assert accepted.zero_force_ds_cpu_optimizer is False
        assert accepted.zero_config.offload_optimizer.pin_memory is False


@pytest.mark.parametrize("name", sorted(file.name for file in SHIPPED.glob("*.json")))
def test_the_readme_explains_every_key_of_a_shipped_file(name):
    readme = (SHIPPED / "README.md").read_text()

    def leaves(value, path=""):
        for key, inner in value.items():
            dotted = f"{path}.{key}" if path else key
            yield from leaves(inner, dotted) if isinstance(inner, dict) else [dotted]

    for path in leaves(json.loads((SHIPPED / name).read_text())):
        assert f"`{path}`" in readme, path


def test_left_out_means_auto_and_an_empty_object_is_a_plain_bf16_run(resolve):
    config = resolve({})
    assert (config.zero_stage, config.offload, config.bf16) == (0, False, True)
    assert config.optimizer.type == "AdamW8bit"
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (2e-5, 0.01, 1.0)
    assert deepspeed_config(config.engine).gradient_clipping == 1.0


AUTO_SCALE = {
    "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 1,
    "consecutive_hysteresis": False, "min_loss_scale": 1,
}  # fmt: skip
OFF, ON, AUTO = {"enabled": False}, {"enabled": True}, {"enabled": "auto"}
PRECISIONS = [  # sections bf16 and fp16 of the JSON, the precision on a machine with bf16, on a card without
    ({}, None, "bf16", "fp16"),
    (AUTO, None, "bf16", "fp16"),
    (AUTO, AUTO, "bf16", "fp16"),
    (None, {}, "bf16", "fp16"),
    (OFF, None, "fp32", "fp16"),  # what is left out is auto
    (OFF, OFF, "fp32", "fp32"),
    (AUTO, OFF, "bf16", "fp32"),
    (AUTO, ON, "fp16", "fp16"),
    (OFF, ON, "fp16", "fp16"),
    (ON, None, "bf16", None),
    (ON, AUTO, "bf16", None),
]


@pytest.mark.parametrize(("bf16", "fp16", "here", "on_a_card_without_bf16"), PRECISIONS)
def test_the_json_and_the_machine_decide_the_precision(resolve, bf16, fp16, here, on_a_card_without_bf16):
    json_file = zero2({name: section for name, section in (("bf16", bf16), ("fp16", fp16)) if section is not None})
    for fill, wanted in ((SIZES, here), (replace(SIZES, native="fp16"), on_a_card_without_bf16)):
        if wanted is None:
            assert "this card has no bf16" in message_of(resolve, json_file, fill=fill)
            continue
        config = resolve(json_file, fill=fill)
        assert (config.precision, config.half, config.bf16_masters) == (wanted, wanted != "fp32", False)
        accepted = deepspeed_config(config.engine)
        assert accepted.bfloat16_config.enabled == (wanted == "bf16")
        assert accepted.float16_config.enabled == (wanted == "fp16")
        if wanted == "fp16":
            assert config.engine["fp16"] == {"enabled": True, **AUTO_SCALE}


def test_a_json_without_fp16_stays_without_it(resolve):
    """Checkpoints keep a hash of the JSON: those of runs in bf16 and fp32 stay what they were."""
    assert "fp16" not in resolve(zero2()).engine
    assert resolve(zero2({"fp16": OFF})).engine["fp16"] == OFF
    assert resolve(zero2({"fp16": {**OFF, "loss_scale": "auto"}})).engine["fp16"] == {**OFF, "loss_scale": 0}


def test_bf16_masters_are_refused_on_a_card_without_bf16_with_the_json_to_take():
    with pytest.raises(UsageError, match=r"this card has none: take --ds ds_configs/zero2\.json"):
        resolve_ds_config(SHIPPED / "zero2_lowram.json", fill=replace(SIZES, native="fp16"))


def test_pin_memory_left_out_is_false_though_deepspeed_would_pin(resolve):
    config = resolve({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert config.engine["zero_optimization"]["offload_optimizer"]["pin_memory"] is False


@pytest.mark.parametrize("name", ["AdamW", "adamw", "Adam"])
def test_an_optimizer_of_deepspeeds_own_stays_in_the_dict(resolve, name):
    config = resolve(zero2({"optimizer.type": name, "optimizer.params.torch_adam": True}))
    accepted = deepspeed_config(config.engine)
    assert accepted.optimizer_name == name.lower()
    assert accepted.optimizer_params == config.optimizer.params
    assert config.optimizer.params["torch_adam"] is True


def test_seven_bytes_a_parameter_are_computed_codes_and_a_residual_of_8_bits():
    config = resolve_ds_config(SHIPPED / "zero2_lowram7.json", fill=SIZES)
    assert (config.optimizer.type, config.bf16_masters, config.rounding) == ("AdamW8bit", True, "residual8")
    assert config.optimizer.params["moments"] == "companded"


def test_sgd_is_handed_in_with_its_own_parameters_alone():
    config = resolve_ds_config(SHIPPED / "zero2_sgd.json", fill=SIZES)
    assert (config.optimizer.type, config.optimizer.ours, config.rounding) == ("SGD", True, "residual")
    assert config.optimizer.params == {"lr": 2e-5, "weight_decay": 0.01} and "optimizer" not in config.engine
    assert deepspeed_config(config.engine).zero_allow_untested_optimizer is True


@pytest.mark.parametrize(("key", "value"), [("momentum", 0.9), ("betas", [0.9, 0.999]), ("moments", "companded")])
def test_sgd_has_no_moments(resolve, key, value):
    changes = {"optimizer": {"type": "SGD", "params": {key: value}}}
    with pytest.raises(UsageError, match=f"optimizer.params.{key} is not a key DeepSpeed reads"):
        resolve(zero2(changes))


@pytest.mark.parametrize(("text", "found"), [("SGD", "SGD"), ("sgd", "SGD"), ("adamw8bit", "AdamW8bit"), ("Lion", "")])
def test_the_type_of_the_optimizer_is_known_before_anything_is_filled(tmp_path, text, found):
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": text}}))
    assert optimizer_type(tmp_path / "ds.json") == found
    (tmp_path / "ds.json").write_text("{}")
    assert optimizer_type(tmp_path / "ds.json") == ""


def test_the_optimizer_type_may_be_in_any_case(resolve):
    assert resolve(zero2({"optimizer.type": "adamw8bit"})).optimizer.type == "AdamW8bit"


def test_null_and_an_offload_param_that_is_off_mean_left_out(resolve):
    off = {"zero_optimization.offload_param": {"device": "none"}, "scheduler": None, "fp16": None, "dump_state": None}
    config = resolve(zero2({**off, "zero_optimization.offload_optimizer": None}))
    assert (config.offload, config.has_scheduler) == (False, False)
    deepspeed_config(config.engine)


def test_batch_sizes_count_all_ranks(resolve):
    from dataclasses import replace

    engine = resolve(zero2(), fill=replace(SIZES, world_size=2)).engine
    assert (engine["train_micro_batch_size_per_gpu"], engine["train_batch_size"]) == (8, 16)


# --- the JSON against flags -------------------------------------------------------------------------


def test_a_number_in_the_json_beats_a_flags_default_and_is_reported(resolve):
    config = resolve(zero2({"optimizer.params.lr": 1e-6, "gradient_clipping": 0, "optimizer.params.weight_decay": 0.1}))
    assert (config.learning_rate, config.max_grad_norm, config.weight_decay) == (1e-6, 0, 0.1)
    assert config.optimizer.params["lr"] == 1e-6
    assert config.engine["gradient_clipping"] == 0


def test_a_number_in_the_json_contradicts_a_typed_flag_unless_they_agree(resolve):
    numbers = zero2({"optimizer.params.lr": 1e-6, "gradient_clipping": 0.5})
    message = message_of(resolve, numbers, typed=["learning_rate", "max_grad_norm"])
    assert "optimizer.params.lr is 1e-06, but --learning_rate 2e-05" in message
    assert "gradient_clipping is 0.5, but --max_grad_norm 1.0" in message
    agreeing = zero2({"optimizer.params.lr": 2e-5, "gradient_clipping": 1})
    assert resolve(agreeing, typed=["learning_rate", "max_grad_norm"]).learning_rate == 2e-5


@pytest.mark.parametrize("name", sorted(PARAMS_BY_TYPE["scheduler"]))
def test_a_schedule_is_filled_and_deepspeed_builds_it(resolve, name):
    import torch
    from deepspeed.runtime import lr_schedules

    config = resolve(zero2({"scheduler": {"type": name}}))
    assert (config.has_scheduler, config.warmup_steps) == (True, 3)
    params = config.engine["scheduler"]["params"]
    assert params.get("warmup_max_lr", 2e-5) == 2e-5 and params.get("total_num_steps", 40) == 40
    getattr(lr_schedules, name)(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5), **params)


@pytest.mark.parametrize(
    ("kind", "warmup", "schedule"),
    [
        ("constant", 0, None),
        ("constant", 3, "constant_with_warmup"),
        ("constant_with_warmup", 0, None),
        ("linear", 0, "linear"),
        ("cosine", 3, "cosine"),
    ],
)
def test_a_schedule_of_the_flags_is_named_unless_the_rate_never_changes(resolve, kind, warmup, schedule):
    config = resolve(zero2(), fill=replace(SIZES, lr_scheduler_type=kind, warmup_steps=warmup))
    assert (config.schedule, config.warmup_steps, config.has_scheduler) == (schedule, warmup, False)


def test_a_schedule_in_the_json_takes_the_flags_warm_up_and_no_second_schedule(resolve):
    json = zero2({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}})
    config = resolve(json)
    assert (config.schedule, config.warmup_steps) == (None, 3)
    recipe = replace(SIZES, lr_scheduler_type="linear")  # a schedule that nobody typed gives way
    assert resolve(json, fill=recipe).schedule is None
    message = message_of(resolve, json, fill=recipe, typed={"lr_scheduler_type"})
    assert "scheduler is in it, but --lr_scheduler_type linear was given: keep one" in message


# --- mistakes are named, all at once --------------------------------------------------------------------

BAD_VALUES = [
    # unknown keys, with the nearest real one
    ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean zero_optimization?"]),
    ({"gradient_cliping": 1}, ["did you mean gradient_clipping?"]),
    ({"zero_optimization.reduce_bucket_siz": 1}, ["zero_optimization.reduce_bucket_siz", "reduce_bucket_size?"]),
    ({"zero_optimization.offload_optimizer.pin_memry": True}, ["did you mean pin_memory?"]),
    ({"bf16.enable": True}, ["bf16.enable", "did you mean enabled?"]),
    ({"optimizer.parms": {}}, ["optimizer.parms", "did you mean params?"]),
    ({"optimizer.params.weight_decy": 0}, ["did you mean weight_decay?"]),
    ({"stage": 2}, ["stage", "belongs in zero_optimization"]),
    ({"zero_optimization.gradient_clipping": 1}, ["belongs at the top level"]),
    ({"nebula": {}}, ["nebula is not a key"]),  # removed from DeepSpeed
    ({"two\nlines": 1}, ["two lines is not a key"]),
    ({"bfloat16": {"enabled": True}}, ["bfloat16", 'write "bf16"']),
    # values that this trainer cannot use
    ({"zero_optimization.stage": 3}, ["stage 3", "sampling", "use 2"]),
    ({"zero_optimization.stage": 4}, ["the number 4", "write 2"]),
    ({"zero_optimization.stage": "2"}, ['the text "2"', "write 2"]),
    ({"zero_optimization.stage": True}, ["zero_optimization.stage is true"]),
    ({"zero_optimization.stage": 0}, ["offload_optimizer needs ZeRO stage 1 or 2"]),
    ({"zero_optimization": True}, ["zero_optimization is true, but must be an object"]),
    ({"fp16.enabled": True, "bf16.enabled": True}, ["both true", "remove one"]),
    ({"fp16.enabled": True, "bf16.bf16_master_weights_and_grads": True}, ["fp16.enabled is true", "zero2.json"]),
    ({"fp16": {"enabled": True, "loss_scale": "dynamic"}}, ['fp16.loss_scale is the text "dynamic"', "from 0 up"]),
    ({"fp16": {"enabled": True, "initial_scale_power": 33}}, ["fp16.initial_scale_power", "from 0 to 32"]),
    ({"fp16": {"enabled": True, "loss_scale_window": 0}}, ["fp16.loss_scale_window", "from 1 up"]),
    ({"fp16": {"enabled": True, "hysteresis": True}}, ["fp16.hysteresis is true"]),
    ({"fp16": {"enabled": True, "min_loss_scale": 0}}, ["fp16.min_loss_scale", "from 1 up"]),
    ({"fp16": {"enabled": True, "initial_scale_power": 3, "min_loss_scale": 9}}, ["min_loss_scale is 9", "at 8"]),
    ({"fp16": {"enabled": True, "loss_scale_windw": 9}}, ["did you mean loss_scale_window?"]),
    ({"fp16.fp16_master_weights_and_grads": True}, ["fp16_master_weights_and_grads", "remove it"]),
    ({"fp16.auto_cast": True}, ["auto_cast", "token ids"]),
    ({"fp16.enabled": True, "zero_optimization": {"stage": 0}}, ["fp16.enabled needs ZeRO stage 1 or 2"]),
    ({"data_types.grad_accum_dtype": "fp32"}, ["grad_accum_dtype", "4 bytes of GPU memory per parameter"]),
    ({"zero_optimization.offload_param": {"device": "cpu"}}, ["offload_param", "stage 3 only"]),
    ({"zero_optimization.offload_optimizer.device": "nvme"}, ["nvme", "stage 3", "write cpu"]),
    ({"zero_optimization.offload_optimizer.device": "cup"}, ['"cup"', "write cpu or none"]),
    ({"zero_optimization.offload_optimizer.ratio": 0.5}, ["ratio", "stage 3 only"]),
    ({"zero_optimization.cpu_offload": True}, ["deprecated", '"device": "cpu"']),
    ({"zero_optimization.compute_grad_norm": False}, ["compute_grad_norm", "gradient_clipping 0"]),
    ({"gradient_allreduce_op": "mean"}, ["gradient_allreduce_op", "sum to 1"]),
    ({"compile": {"deepcompile": True}}, ["compile.deepcompile", "remove it"]),
    ({"bf16.bf16_optimizer_states": True}, ["needs bf16.bf16_master_weights_and_grads"]),
    ({"optimizer.type": "Lion"}, ["optimizer.type", "AdamW8bit, SGD, Adam, AdamW"]),
    ({"optimizer.type": ["AdamW"]}, ["optimizer.type is a list"]),
    ({"scheduler": {}}, ["scheduler.type is missing"]),
    ({"wall_clock_breakdown": "yes"}, ["wall_clock_breakdown", "write true or false"]),
    ({"optimizer.params.max_grad_norm": 1}, ['"gradient_clipping"']),
    ({"scheduler": {"type": "OneCycle"}}, ["scheduler.type", "WarmupLR"]),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}}, ["learning rate is 2e-05", '"auto"']),
    # two settings that contradict each other
    ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "--pack_tokens"]),
    ({"train_micro_batch_size_per_gpu": 3}, ["the number 3", "make 8"]),
    ({"train_batch_size": 64}, ["train_batch_size", "8 completions x 1 ranks make 8"]),
    ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer must be true"]),
    ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer must be false"]),
    # "auto" that nothing fills, and values of the wrong kind
    ({"steps_per_print": "auto"}, ['steps_per_print is "auto"']),
    ({"fp16.enabled": "yes"}, ["fp16.enabled", "write true or false"]),
    ({"zero_optimization.stage": "auto"}, ["zero_optimization.stage", "write 2"]),
    ({"bf16": "auto"}, ['bf16 is the text "auto"', "object"]),  # raw DeepSpeed: silently off
    ({"bf16.enabled": "true"}, ["bf16.enabled", "write true or false"]),
    ({"optimizer.params.lr": "1e-5"}, ['the text "1e-5"', "a number"]),
    ({"optimizer.params.lr": -1}, ["optimizer.params.lr", "from 0 up"]),
    ({"optimizer.params.betas": 0.9}, ["optimizer.params.betas", "two numbers"]),
    ({"optimizer.params.betas": [0.9, 1]}, ["optimizer.params.betas", "two numbers below 1"]),
    ({"gradient_clipping": True}, ["gradient_clipping is true"]),
    ({"zero_optimization.reduce_bucket_size": 0}, ["reduce_bucket_size", "from 1 up"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD_VALUES, ids=[str(row[0])[1:50] for row in BAD_VALUES])
def test_a_wrong_value_is_named_with_its_remedy(resolve, changes, words):
    message = message_of(resolve, zero2(changes))
    assert len(message.splitlines()) == 2, f"one mistake is one problem:\n{message}"
    for word in words:
        assert word in message


def test_everything_wrong_is_in_one_error_of_six_lines(resolve):
    changes = {"gradient_cliping": 1, "zero_optimization.stage": 3, "fp16.enabled": 1, "optimizer.params.lr": "x"}
    message = message_of(resolve, zero2(changes))
    for word in ("gradient_cliping", "stage 3", "fp16", "optimizer.params.lr"):
        assert word in message
    changes |= {"train_batch_size": 5, "steps_per_print": "auto"}
    assert "and 2 more" in message_of(resolve, zero2(changes))


BAD_FILES = [
    ('{"bf16": {"enabled": true,}}', ["line 1", "column", "Remove the comma"]),
    ('{\n  "bf16": {"enabled": true},\n  // small card\n  "zero_optimization": {}\n}', ["line 3", "no comments"]),
    ('{\n  "bf16": {"enabled": True}\n}', ["line 2", "true, false and null"]),
    ("{'bf16': {}}", ["double quotes"]),
    ('{\n  "bf16": {}\n  "optimizer": {}\n}', ["line 3", "comma is missing"]),
    ('{"bf16": {', ["line 1", "Compare with", "ds_configs/zero2.json"]),
    ("", ["line 1", "nothing there"]),
    ("[]", ["holds a list", "object"]),
    ("null", ["holds null"]),
    ('{"bf16": {}, "bf16": {}}', ['"bf16" is given twice']),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', ['"stage" is given twice']),
    ('{"gradient_clipping": NaN}', ["NaN", "finite"]),
    ('{"gradient_clipping": 1e999}', ["gradient_clipping", "a number"]),
    ('{"gradient_clipping": ' + "[" * 100_000, ["is not a DeepSpeed JSON"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=[row[0][:30] for row in BAD_FILES])
def test_a_broken_file_is_an_error_with_a_place(resolve, text, words):
    message = message_of(resolve, text)
    for word in words:
        assert word in message


def test_a_missing_file_names_those_that_ship(tmp_path):
    for path, what in ((tmp_path / "zero.json", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UsageError, match=what) as caught:
            resolve_ds_config(path, fill=SIZES)
        assert "ds_configs/zero2.json, ds_configs/zero2_gpu.json" in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UsageError, match="is not a DeepSpeed JSON"):
        resolve_ds_config(tmp_path / "ds.json", fill=SIZES)


def test_no_heavy_library_is_needed_to_find_a_typo():
    heavy = "torch deepspeed pydantic transformers numpy"
    code = f"import sys, grpo_ds.settings.ds_config; print(*set(sys.modules) & set('{heavy}'.split()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# --- our tables equal the installed DeepSpeed's ----------------------------------------------------------------


def test_pydantic_sections_know_exactly_the_keys_deepspeed_knows():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    for section, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ):
        real = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        assert real == KNOWN_KEYS[section], section


class RecordingDict(dict):
    """A dict that remembers every key it was asked for."""

    def __init__(self, **items):
        super().__init__(**items)
        self.asked: set[str] = set()

    def __copy__(self):  # DeepSpeed reads a copy
        return self

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self


def test_top_level_keys_are_those_deepspeed_asks_for():
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    config = RecordingDict(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(config)
    by_ranks = {"sequence_parallel_size"}  # asked only where torch.distributed runs, as after another test
    assert config.asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - by_ranks == KNOWN_KEYS[""]


def test_optimizer_and_schedule_parameters_are_those_of_the_classes():
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.runtime import lr_schedules

    def parameters(made):
        return set(inspect.signature(made).parameters) - {"optimizer", "model_params"}

    for name, known in PARAMS_BY_TYPE["scheduler"].items():
        assert parameters(getattr(lr_schedules, name)) >= known, name
    assert parameters(lr_schedules.WarmupDecayLR) == PARAMS_BY_TYPE["scheduler"]["WarmupDecayLR"]
    # adam_w_mode and torch_adam are the engine's own (runtime/config.py); it derives adamw_mode from them.
    by_engine = {"adam_w_mode", "torch_adam"}
    assert parameters(DeepSpeedCPUAdam) - {"adamw_mode"} | by_engine == PARAMS_BY_TYPE["optimizer"]["AdamW"]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_allreduce_op": "median"},
        {"compile": {"deepcompile": True}},
        {"zero_optimization.offload_optimizer.ratio": 0.5},
        {"zero_optimization.offload_optimizer.device": "cup"},
        {"bf16.bf16_optimizer_states": True},
    ],
)
def test_what_we_refuse_deepspeed_would_have_refused_with_a_traceback(resolve, changes):
    engine = resolve(zero2()).engine
    for path, value in changes.items():
        section, _, key = path.rpartition(".")
        target = engine
        for name in section.split(".") if section else ():
            target = target.setdefault(name, {})
        target[key] = value
    with pytest.raises(DEEPSPEED_RAISES):
        deepspeed_config(engine)
    message_of(resolve, zero2(changes))
