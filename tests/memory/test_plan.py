"""The plan: the ladder of bytes per parameter, phases that only grow with the work, changes that make a run fit.

Its bytes of GPU memory are compared with a simulated card: tests/card/test_plan.py.
"""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_ds.memory.plan import GIB, PHASES, PhasePlan, Plan, make_plan, relative_plan_error
from grpo_ds.memory.select import RAM_RESERVE, Job, applied, fits, fitted, remedies, reserved
from grpo_ds.models.shapes import PRESET_CONFIGS, shape_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.settings.shipped import CONFIGS, DS_JSONS
from tests.conftest import check_example

CONFIG = TrainConfig()
SHAPE = shape_of("qwen2.5-1.5b")
JSONS = sorted(file.stem for file in Path("ds_configs").glob("*.json"))
SIZES = DsSizes(1e-6, 0.0, 1.0, 0, 100, CONFIG.batch_size * CONFIG.num_generations, 1, native="bf16")
OPTIMIZER = ("master weights", "gradients", "staging buffer", "moments", "residual", "accumulated gradients")


@pytest.fixture(scope="session")
def ds_from(tmp_path_factory):
    """Return the shipped JSON with some keys changed: a__b=value sets "a": {"b": value}."""

    def make(name="zero2", sizes=SIZES, **changes):
        engine = json.loads((DS_JSONS.folder / f"{name}.json").read_text())
        for path, value in changes.items():
            section, *inner = path.split("__")
            target = engine.setdefault(section, {})
            for key in inner[:-1]:
                target = target.setdefault(key, {})
            target[inner[-1]] = value
        file = tmp_path_factory.mktemp("ds") / "ds.json"
        file.write_text(json.dumps(engine))
        return resolve_ds_config(file, fill=sizes)

    return make


@pytest.mark.parametrize("cls", [PhasePlan, Plan])
def test_the_example_of_a_data_class_is_right(cls):
    check_example(cls)


def test_the_error_of_a_plan_is_relative_to_what_was_measured():
    assert relative_plan_error(5, 4) == 0.2 and relative_plan_error(4, 5) == -0.25  # above 0: the plan was too low
    assert [relative_plan_error(*pair) for pair in ((5, None), (5, 0), (0, 5))] == [None] * 3


def phase(plan, name):
    return plan.phases[PHASES.index(name)]


LADDER = [  # name of the JSON, changes, pack_tokens, bytes per parameter in RAM
    ("zero2", {"optimizer": {"type": "AdamW"}}, 0, 4 + 4 + 2 + 8),
    ("zero2", {"optimizer": {"type": "AdamW"}}, 1100, 4 + 4 + 2 + 8 + 2),
    ("zero2", {"share_staging": False}, 0, 4 + 4 + 2 + 2.03),
    ("zero2", {}, 0, 4 + 4 + 2.03),
    ("zero2", {}, 1100, 4 + 4 + 2.03 + 2),
    ("zero2_lowram", {}, 0, 2 + 2 + 2.03 + 2),
    ("zero2_lowram", {}, 1100, 2 + 2 + 2.03 + 2),  # several backwards add up in the gradients themselves
    ("zero2_lowram7", {}, 0, 2 + 2 + 2.03 + 1),
    ("zero2_lowram", {"rounding": "stochastic"}, 0, 2 + 2 + 2.03),
    ("zero2_sgd", {}, 0, 2 + 2 + 2),
    ("zero2_sgd", {"rounding": "residual8"}, 0, 2 + 2 + 1),
    ("zero2_gpu", {}, 0, 0),
]


@pytest.mark.parametrize(("name", "changes", "pack_tokens", "expected"), LADDER)
def test_the_ladder_of_ram_bytes_per_parameter(ds_from, name, changes, pack_tokens, expected):
    if "optimizer" in changes:
        ds = ds_from(name, optimizer__type="AdamW", optimizer__params={})
    else:
        ds = ds_from(name, **{f"optimizer__params__{key}": value for key, value in changes.items()})
    ram = phase(make_plan(SHAPE, replace(CONFIG, pack_tokens=pack_tokens), ds), "step").ram
    assert sum(ram.get(part, 0) for part in OPTIMIZER) / SHAPE.parameters == pytest.approx(expected, abs=0.002)


GROWING = {
    **{"num_generations": (2, 4, 8, 16), "batch_size": (1, 2, 4), "max_prompt_length": (128, 512, 1024)},
    **{"max_completion_length": (64, 300, 1000), "logprob_chunk_mib": (16.0, 64.0, 256.0)},
    **{"generation_batch_size": (4, 8, 64), "pack_tokens": (1100, 2000, 4000), "lora_r": (1, 8, 64)},
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("flag", GROWING)
def test_more_work_never_takes_less_memory(ds_from, flag, device):
    for name, checkpointing in itertools.product(("zero2", "zero2_gpu", "zero2_lowram"), (True, False)):
        config = replace(
            CONFIG, batch_size=2, gradient_checkpointing=checkpointing, pack_tokens=1100 if flag == "pack_tokens" else 0
        )
        sizes = [
            [(p.gpu_bytes, p.ram_bytes) for p in make_plan(SHAPE, changed, ds_from(name), device=device).phases]
            for changed in (replace(config, **{flag: value}) for value in GROWING[flag])
        ]
        if flag == "pack_tokens":  # fewer backwards: more activations, no buffer to accumulate in
            sizes = [[step[PHASES.index("sample")]] for step in sizes][::-1]
        for less, more in itertools.pairwise(sizes):
            assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize(("name", "device"), itertools.product(JSONS, ("cuda", "cpu")))
def test_a_larger_model_takes_more_in_every_phase(ds_from, name, device):
    ds = ds_from(name)
    models = [shape_of(f"qwen2.5-{size}") for size in ("0.5b", "1.5b", "3b", "7b")]
    plans = [make_plan(shape, CONFIG, ds, device=device).phases for shape in models]
    for small, large in itertools.pairwise(plans):
        assert all(a.gpu_bytes <= b.gpu_bytes and a.ram_bytes <= b.ram_bytes for a, b in zip(small, large, strict=True))


def test_on_the_cpu_all_of_it_is_in_ram(ds_from):
    ds = ds_from()
    there, here = make_plan(SHAPE, CONFIG, ds), make_plan(SHAPE, CONFIG, ds, device="cpu")
    assert [p.name for p in here.phases] == list(PHASES) and here.peak("gpu") == 0
    update = phase(there, "update")
    of_cuda = update.ram["CUDA in RAM"] + update.gpu["cuBLAS workspaces"] + update.gpu["CUDA graphs"]
    assert update.gpu_bytes + update.ram_bytes - of_cuda == phase(here, "update").ram_bytes


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("changes", [{}, {"reference": "bf16"}, {"beta": 0.0}, {"lora_r": 16}])
def test_a_run_that_fits_can_be_resumed(ds_from, name, changes):
    """The system drops a checkpoint's pages where memory is short; the rest is no more than training needs."""
    plan = make_plan(SHAPE, replace(CONFIG, **changes), ds_from(name))
    resume = phase(plan, "resume")
    assert resume.ram["mapped file"] > 0 or name == "zero2_gpu"
    for kind in ("gpu", "ram"):
        assert resume.needed_in(kind) <= max(p.needed_in(kind) for p in plan.phases if p is not resume)


@pytest.mark.parametrize(("size", "most"), [("0.5b", 0.989e9), ("3b", 1e9), ("7b", 152_064 * 3584 * 2)])
def test_saving_copies_a_file_at_a_time_and_a_tensor_is_not_split(ds_from, size, most):
    save = phase(make_plan(shape_of(f"qwen2.5-{size}"), CONFIG, ds_from("zero2")), "save")
    assert save.ram["shard in transfer"] == pytest.approx(most, rel=1e-3)


SIZES_ON_DISK = [  # JSON, changes, bytes a parameter: masters, moments, (residual,) weights, reference
    ("zero2", {}, 4 + 2.03 + 2 + 1.03),
    ("zero2_lowram", {}, 2 + 2.03 + 2 + 2 + 1.03),
    ("zero2_lowram7", {}, 2 + 2.03 + 1 + 2 + 1.03),
    ("zero2_sgd", {}, 2 + 2 + 2 + 1.03),
    ("zero2", {"beta": 0.0}, 4 + 2.03 + 2),
]


@pytest.mark.parametrize(("name", "changes", "expected"), SIZES_ON_DISK)
def test_the_size_of_a_checkpoint(ds_from, name, changes, expected):
    plan = make_plan(SHAPE, replace(CONFIG, **changes), ds_from(name))
    assert plan.checkpoint / SHAPE.parameters == pytest.approx(expected, abs=0.02)


def test_no_reference_takes_nothing(ds_from):
    plan = make_plan(SHAPE, replace(CONFIG, beta=0.0), ds_from())
    assert not any("reference" in p.gpu | p.ram for p in plan.phases)


def test_each_kind_of_reference_is_in_its_memory(ds_from):
    plans = {
        kind: make_plan(SHAPE, replace(CONFIG, reference=kind), ds_from()) for kind in ("int8", "bf16", "bf16-cpu")
    }
    assert phase(plans["int8"], "update").gpu["reference"] / SHAPE.parameters == pytest.approx(1.031, abs=0.001)
    assert phase(plans["bf16"], "update").gpu["reference"] == 2 * SHAPE.parameters
    assert "reference" not in phase(plans["bf16-cpu"], "update").gpu
    assert phase(plans["bf16-cpu"], "update").ram["reference"] == 2 * SHAPE.parameters


LORA = replace(CONFIG, lora_r=16)


def test_an_adapter_has_masters_gradients_and_moments_of_its_own_alone(ds_from):
    trained = SHAPE.lora_parameters(16, ["all-linear"])
    plan = make_plan(SHAPE, LORA, ds_from())
    ram, gpu = phase(plan, "step").ram, phase(plan, "step").gpu
    assert sum(ram.get(part, 0) for part in OPTIMIZER) / trained == pytest.approx(4 + 4 + 2.03, abs=0.002)
    assert gpu["weights"] == 2 * (SHAPE.parameters + trained) and gpu["reference"] == 2 * trained


def test_fewer_bits_a_larger_model(ds_from):
    shape, plans = shape_of("qwen2.5-7b"), []
    for bits in ({}, {"load_in_8bit": True}, {"load_in_4bit": True}):
        plans.append(make_plan(shape, replace(LORA, **bits), ds_from()))
    weights = [phase(plan, "step").gpu["weights"] / shape.parameters for plan in plans]
    # 1.09 G of 7.62 G parameters stay in 2 bytes: embedding and head; the rest takes 2, 1 and 0.516; adapter: 0.01
    assert weights == pytest.approx([2.01, 1.15, 0.74], abs=0.01)
    for more, less in itertools.pairwise(plans):
        assert more.peak("gpu") > less.peak("gpu") and more.peak("ram") >= less.peak("ram")
    assert fits(plans[2], 10, 16) and not fits(plans[1], 10, 16)


def test_a_merged_model_passes_through_ram(ds_from):
    plain, merging = (make_plan(SHAPE, replace(LORA, merge_adapter=merge), ds_from()) for merge in (False, True))
    assert phase(merging, "save").ram_bytes - phase(plain, "save").ram_bytes == 2 * SHAPE.parameters


def test_the_worked_file_for_a_card_of_12_gb_fits_it(tmp_path):
    file = CONFIGS.find("qwen2.5-3b-lora-12gb.yaml")
    config = parse(TrainConfig, ["--config", str(file)], about="").config()
    ds = resolve_ds_config(config.ds, fill=config.ds_sizes(native="bf16"))
    plan = make_plan(shape_of(config.model), config, ds)
    said = re.search(r"([\d.]+) GiB of GPU memory and ([\d.]+) GiB of RAM", file.read_text())
    assert said and [float(number) for number in said.groups()] == [
        round(plan.peak(kind) / GIB, 1) for kind in ("gpu", "ram")
    ]
    assert config.lora_r and fits(plan, 12, 16)


def test_pinned_blocks_are_powers_of_two(ds_from):
    ram = phase(make_plan(SHAPE, CONFIG, ds_from(zero_optimization__offload_optimizer__pin_memory=True)), "step").ram
    # 1.54 G parameters x 4 bytes are 5.75 GiB; the next power of two is 8 GiB
    assert ram["master weights"] == ram["gradients"] == 8 * GIB


def test_margins_count(ds_from):
    plan = make_plan(SHAPE, CONFIG, ds_from())
    gpu, ram = reserved(plan.peak("gpu")) / GIB + 0.5, (plan.peak("ram") + RAM_RESERVE) / GIB
    assert fits(plan, gpu + 0.01, ram + 0.01)
    assert not fits(plan, gpu - 0.01, ram + 0.01) and not fits(plan, gpu + 0.01, ram - 0.01)


TIGHT = [  # model, JSON, changes of the config, card, RAM
    ("qwen2.5-1.5b", "zero2", {}, 16, 18),
    ("qwen2.5-1.5b", "zero2_gpu", {}, 16, 32),
    ("qwen2.5-3b", "zero2", {}, 16, 32),
    ("qwen2.5-3b", "zero2", {"num_generations": 16, "batch_size": 8}, 16, 64),
    ("qwen2.5-1.5b", "zero2", {"gradient_checkpointing": False}, 8, 64),
    ("qwen2.5-1.5b", "zero2", {"reference": "bf16"}, 7, 64),
    ("qwen2.5-0.5b", "zero2_gpu", {"reference": "bf16-cpu"}, 3, 12),
    ("qwen2.5-7b", "zero2", {"lora_r": 8}, 12, 32),
]


@pytest.mark.parametrize(("model", "name", "changes", "gpu", "ram"), TIGHT)
def test_remedies_make_it_fit_and_none_of_them_is_too_many(ds_from, model, name, changes, gpu, ram):
    job = Job(shape_of(model), replace(CONFIG, **changes), ds_from(name))
    found = remedies(job, gpu, ram)
    assert found and not fits(job.plan(), gpu, ram)
    assert fits(applied(job, found).plan(), gpu, ram)
    for left_out in found:
        fewer = applied(job, tuple(r for r in found if r is not left_out))
        assert fewer is None or not fits(fewer.plan(), gpu, ram)  # None: one of them would change nothing


def test_what_fits_needs_no_remedy_and_what_never_fits_has_none(ds_from):
    assert remedies(Job(SHAPE, CONFIG, ds_from()), 80, 200) == ()
    assert remedies(Job(shape_of("qwen2.5-7b"), CONFIG, ds_from()), 4, 4) == ()


@pytest.mark.parametrize("model", PRESET_CONFIGS)
def test_every_phase_names_its_components(ds_from, model):
    for p in make_plan(shape_of(model), CONFIG, ds_from()).phases:
        assert p.ram and all(size > 0 for size in (p.gpu | p.ram).values())


@pytest.mark.parametrize("gpu_gib", [8, 16, 24, 80])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"])
def test_sizes_left_to_the_memory_fill_it_and_no_more(ds_from, model, gpu_gib):
    job = Job(shape_of(model), CONFIG, ds_from())
    chosen = fitted(job, gpu_gib, 64)
    plan, kept = chosen.plan(), replace(CONFIG, gradient_checkpointing=True, generation_batch_size=8)
    assert chosen.config.generation_batch_size == 8 or plan.binding("gpu").name != "evaluate"
    if not chosen.config.gradient_checkpointing:
        assert fits(plan, gpu_gib, 64)
    assert fits(plan, gpu_gib, 64) == fits(make_plan(job.shape, kept, job.ds), gpu_gib, 64)


def test_a_small_model_on_a_large_card_keeps_its_activations_and_a_large_one_recomputes_them(ds_from):
    choices = [fitted(Job(shape_of(f"qwen2.5-{size}"), CONFIG, ds_from()), 24, 64).config for size in ("0.5b", "3b")]
    assert [config.gradient_checkpointing for config in choices] == [False, True]


def test_sizes_that_were_typed_stay(ds_from):
    typed = replace(CONFIG, gradient_checkpointing=True, generation_batch_size=4)
    assert fitted(Job(SHAPE, typed, ds_from()), 80, 64).config == typed
