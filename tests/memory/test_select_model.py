"""launch/select_model.py: the table, one model in detail, JSON, errors; never torch."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config
from tests.conftest import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "select_model.py"


@pytest.fixture
def select(capsys):
    """Run the script with these flags and return its output."""
    spec = importlib.util.spec_from_file_location("select_model", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["select_model"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)

    def run(*words):
        script.main([str(word) for word in words])
        return capsys.readouterr().out

    return run


def launch(*command):
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_card_gets_a_table_and_a_command_that_train_takes():
    result = launch(SCRIPT, "--gpu_gib", 24, "--ram_gib", 32, "--num_generations", 8)
    assert result.returncode == 0, result.stderr
    for word in ("qwen2.5-0.5b", "qwen2.5-7b", "zero2.json", "zero2_lowram.json", "bf16-cpu", "none", "fits", "update"):
        assert word in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("Run: deepspeed launch/train.py "))
    config = parse(TrainConfig, line.split()[3:], about="").config()
    assert config.num_generations == 8 and config.model in result.stdout


def test_one_model_is_shown_phase_by_phase(select):
    shown = select("--gpu_gib", 24, "--ram_gib", 64, "--model", "qwen2.5-3b", "--ds", "ds_configs/zero2_lowram.json")
    for word in ("initialise", "reference", "save", "master weights", "residual", "KV cache", "gradient bucket", "sum"):
        assert word in shown
    assert "qwen2.5-7b" not in shown


def test_a_card_without_bf16_is_planned_in_fp16(select, monkeypatch):
    """The same bytes as in bf16, except while a bf16 file is converted, and no JSON with bf16 masters."""
    words = ("--gpu_gib", 16, "--ram_gib", 64, "--model", "qwen2.5-1.5b", "--json")

    def planned():
        found = json.loads(select(*words))["candidates"]
        return {(c["ds"], c["reference"]): c["phases"] for c in found}

    bf16 = planned()
    monkeypatch.setattr("grpo_ds.system.hardware.compute_capability", lambda: (7, 5))
    fp16 = planned()
    assert {ds for ds, _ in bf16} - {ds for ds, _ in fp16} == {
        "ds_configs/zero2_lowram.json", "ds_configs/zero2_lowram7.json"
    }  # fmt: skip
    for key, phases in fp16.items():
        assert {name: phase for name, phase in phases.items() if phase != bf16[key][name]}.keys() == {"load"}


@pytest.mark.parametrize(
    ("words", "larger"),
    [
        (("--gpu_gib", 12, "--ram_gib", 24), "qwen2.5-3b"),
        (("--gpu_gib", 12, "--ram_gib", 16), None),  # Adam has the same model
        (("--gpu_gib", 12, "--ram_gib", 14), "qwen2.5-1.5b"),
        (("--gpu", "T4", "--ram_gib", 24), None),  # SGD's JSON has bf16 masters
        (("--gpu_gib", 12, "--ram_gib", 24, "--ds", "ds_configs/zero2.json"), None),
    ],
)
def test_sgd_is_named_where_it_makes_a_larger_model_fit(select, words, larger):
    lines = select(*words).splitlines()
    found = [line for line in lines if line.startswith("All parameters, by SGD: ")]
    assert [larger in line for line in found] == ([True] if larger else [])
    if larger:
        command = lines[lines.index(found[0]) + 1]
        assert f"--model {larger} --ds ds_configs/zero2_sgd.json" in command


@pytest.mark.parametrize(("ram", "ds"), [(15.3, "zero2_lowram7"), (18, "zero2_lowram"), (24, "zero2")])
def test_the_first_json_that_fits_is_named(select, ram, ds):
    """14.0 GiB are planned for 1.5B with a residual of 16 bits, 12.6 with one of 8; Linux sees 15.3 of 16 GB."""
    assert f"--model qwen2.5-1.5b --ds ds_configs/{ds}.json\n" in select("--gpu_gib", 12, "--ram_gib", ram)


def test_what_does_not_fit_is_answered_with_changes(select):
    shown = select("--gpu_gib", 16, "--ram_gib", 18, "--model", "qwen2.5-1.5b", "--ds", "ds_configs/zero2.json")
    assert "Nothing fits yet" in shown and "costs:" in shown


def test_what_never_fits_is_said(select):
    assert "Nothing fits, even with all changes." in select("--gpu_gib", 4, "--ram_gib", 8, "--model", "qwen2.5-7b")


def test_json_is_json_and_names_every_byte(select):
    answer = json.loads(select("--gpu_gib", 16, "--ram_gib", 32, "--json"))
    largest = max((c for c in answer["candidates"] if c["fits"]), key=lambda c: c["parameters"])
    assert f"--model {largest['model']} " in answer["run"]
    assert set(largest["phases"]["update"]["gpu"]) >= {"weights", "gradient bucket"}


def test_a_reference_that_was_asked_for_is_the_only_one(select):
    shown = select("--gpu_gib", 24, "--ram_gib", 64, "--reference", "llm.int8")
    assert "llm.int8" in shown and "bf16-cpu" not in shown


def test_no_card_means_the_cpu(select):
    assert "--model smollm2-135m" in select("--gpu_gib", 0, "--ram_gib", 16)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu_gb", 16], "--gpu_gib"),
        (["--gpu_gib", "many"], "gpu_gib"),
        (["--gpu_gib", -1], "0 GiB"),
        (["--gpu_gib", 16, "--num_generations", 1], "compares completions of a group"),
        (["--gpu", "GTX 1060"], "'GTX 1060'; known are RTX 2060"),
        (["--gpu_gib", 16, "--ds", "nowhere.json"], "nowhere.json"),
        (["--gpu_gib", 16, "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_errors_name_what_is_wrong(select, words, expected):
    with pytest.raises(UsageError) as error:
        select(*words)
    assert expected in str(error.value) and len(str(error.value).splitlines()) <= MAX_LINES


def test_an_error_ends_in_its_exit_code_without_a_traceback():
    result = launch(SCRIPT, "--gpu_gib", 16, "--ds", "nowhere.json")
    assert result.returncode == 2 and "nowhere.json" in result.stderr and "Traceback" not in result.stderr


def test_torch_is_not_imported():
    code = (
        "import sys, runpy; sys.argv = ['select_model.py', '--gpu_gib', '16', '--ram_gib', '32', '--json'];"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__');"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    result = launch("-c", code)
    assert result.returncode == 0, result.stderr


def test_a_model_trained_here_is_planned_with_the_lengths_beside_it(select, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    lengths = {"max_prompt_length": 900, "max_completion_length": 600}
    typed = [word for name, value in lengths.items() for word in (f"--{name}", value)]
    asked = ("--gpu_gib", 16, "--ram_gib", 32, "--json", "--model", tmp_path)
    plain, wanted = (json.loads(select(*asked, *more))["candidates"] for more in ([], typed))
    write_config(TrainConfig(**lengths), tmp_path)
    assert json.loads(select(*asked))["candidates"] == wanted != plain


def test_it_opens_with_the_largest_model_of_each_way_and_its_command(select):
    lines = select("--gpu_gib", 12, "--ram_gib", 32).splitlines()
    assert lines[0] == "The largest models for 12 GiB of GPU memory and 32 GiB of RAM:"
    found = dict(zip(("All parameters", "LoRA", "QLoRA"), zip(lines[1:7:2], lines[2:7:2], strict=True), strict=True))
    for way, (answer, command) in found.items():
        assert re.fullmatch(
            rf"{way}: qwen2.5-\w+, with [\d.]+ GiB of GPU memory and [\d.]+ GiB of RAM; "
            r"\d+ s a step, [\d.]+ hours for 100 steps \(computed\)",
            answer,
        )
        config = parse(TrainConfig, command.split("launch/train.py")[1].split(), about="").config()
        assert f" {config.model}," in answer
        assert (config.lora_r > 0, config.load_in_4bit) == ("LoRA" in way, way == "QLoRA")
    assert "qwen2.5-3b, with 10.7 GiB of GPU memory and 25.6 GiB" in found["All parameters"][0]  # README's table
    assert "computed, not measured, from the figures of the RTX 3060" in lines[7]


def test_the_answer_is_about_what_was_typed(select):
    way = ("--gpu_gib", 24, "--ram_gib", 32, "--lora_r", 8, "--num_steps", 60, "--json")
    (answer,) = json.loads(select(*way))["answers"]
    assert answer["way"] == "LoRA" and " --lora_r 8" in answer["run"]
    assert answer["hours"] == pytest.approx(answer["seconds_per_step"] * 60 / 3600)
    nothing = json.loads(select("--gpu_gib", 2, "--ram_gib", 4, "--model", "qwen2.5-7b", "--json"))["answers"]
    assert [it["model"] for it in nothing] == [None] * 3
    (cpu,) = json.loads(select("--gpu_gib", 0, "--ram_gib", 16, "--json"))["answers"]
    assert cpu["model"] == "smollm2-135m" and cpu["seconds_per_step"] is None  # measured, and said so:
    assert "Measured on two CPU cores" in select("--gpu_gib", 0, "--ram_gib", 16)


@pytest.mark.parametrize(("card", "model"), [("T4", "1.5b"), ("RTX 2080 Ti", "1.5b"), ("RTX 4060 Ti", "3b")])
def test_a_card_without_bf16_gets_no_bf16_masters(select, card, model):
    run = select("--gpu", card, "--gpu_gib", 16, "--ram_gib", 32).splitlines()[-1]
    assert f"--model qwen2.5-{model}" in run and ("lowram" in run) == (model == "3b")


def test_an_adapter_takes_the_json_of_every_other_run(select):
    shown = select("--gpu_gib", 12, "--ram_gib", 32)
    assert all("--ds ds_configs/zero2.json" in line for line in shown.splitlines() if "--lora_r" in line)


def test_a_named_card_brings_its_memory_and_its_figures(select, monkeypatch):
    slow, fast = (json.loads(select("--gpu", name, "--ram_gib", 32, "--json")) for name in ("L4", "RTX 3090"))
    assert (slow["gpu_gib"], fast["gpu_gib"]) == (22.5, 24)
    assert slow["answers"][0]["seconds_per_step"] > fast["answers"][0]["seconds_per_step"]
    monkeypatch.setattr("grpo_ds.commands.select.gpu_memory_gib", lambda: 14.6)
    monkeypatch.setattr("grpo_ds.commands.select.gpu_name", lambda: "Tesla T4")
    assert "figures of the T4 " in select("--ram_gib", 32)
    assert "figures of the RTX 3060 " in select("--ram_gib", 32, "--gpu_gib", 12)  # of another machine
