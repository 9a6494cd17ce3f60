"""docs/recipes.md: every recipe fits its machine, and every figure on the page is the plan's."""

import re
from pathlib import Path

import pytest

from grpo_ds.memory.plan import GIB, Plan
from grpo_ds.memory.select import Job, fits, fitted
from grpo_ds.models.presets import PRESETS, lora_recipe
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPE = re.compile(r"^\| (none|\d+), (\d+) \| [^|]+ \| `([^`]+)` \| ([\d.]*) ?\| ([\d.]+) \|$", re.M)
FLAG = re.compile(r"^\| `(\w+)` \| ([^|]+) \|([^|]*)\|([^|]*)\|", re.M)
BASE = "--model qwen2.5-1.5b --batch_size 4 --num_generations 8 --gradient_checkpointing true"
BASE_PEAKS = "7.9", "17.8"


def plan_of(flags: str, gpu: float, ram: float) -> Plan:
    """Return the plan that train.py would print with --plan on such a machine."""
    parsed = parse(TrainConfig, flags.split(), about="")
    asked = parsed.unchecked()
    config = parsed.config(lora_recipe(PRESETS[asked.model].recipe, asked))
    ds = resolve_ds_config(ROOT / config.ds, fill=config.ds_sizes(native="bf16" if gpu else "fp32"))
    return fitted(Job(shape_of(config.model), config, ds, "cuda" if gpu else "cpu"), gpu, ram).plan()


def peaks(plan: Plan) -> tuple[str, str]:
    return f"{plan.peak('gpu') / GIB:.1f}", f"{plan.peak('ram') / GIB:.1f}"


@pytest.mark.parametrize(("card", "ram", "flags", "gpu_peak", "ram_peak"), RECIPE.findall(PAGE))
def test_a_recipe_fits_its_machine_and_takes_what_the_page_says(monkeypatch, card, ram, flags, gpu_peak, ram_peak):
    monkeypatch.chdir(ROOT)
    gpu = 0.0 if card == "none" else float(card)
    plan = plan_of(flags, gpu, float(ram))
    assert fits(plan, gpu, float(ram))
    assert peaks(plan) == (gpu_peak or "0.0", ram_peak)


def test_every_row_of_the_page_is_read():
    assert len(RECIPE.findall(PAGE)) == len(re.findall(r"^\| (?:none|\d+), \d+ \|", PAGE, re.M)) >= 12
    assert len(FLAG.findall(PAGE)) == len(re.findall(r"^\| `\w+` \|", PAGE, re.M)) >= 12


@pytest.mark.parametrize(("flag", "values", "gpu_peaks", "ram_peaks"), FLAG.findall(PAGE))
def test_a_flag_costs_what_the_page_says(monkeypatch, flag, values, gpu_peaks, ram_peaks):
    monkeypatch.chdir(ROOT)
    for number, value in enumerate(values.split(", ")):
        given = f"ds_configs/{value}" if flag == "ds" else value
        on_the_page = (_nth(gpu_peaks, number) or BASE_PEAKS[0], _nth(ram_peaks, number) or BASE_PEAKS[1])
        assert peaks(plan_of(f"{BASE} --{flag} {given}", 16, 32)) == on_the_page, value


def _nth(figures: str, number: int) -> str:
    listed = [figure.strip() for figure in figures.split(",")]
    return listed[number] if len(listed) > number else ""
