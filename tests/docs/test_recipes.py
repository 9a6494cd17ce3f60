"""docs/recipes.md: every recipe fits the machine it is for, and every figure on the page is the plan's."""

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
KNOB = re.compile(r"^\| `(\w+)` \| ([^|]+) \|([^|]*)\|([^|]*)\|", re.M)
BASE = "--model qwen2.5-1.5b --batch_size 4 --num_generations 8 --gradient_checkpointing true"
BASE_PEAKS = "7.8", "17.8"


def plan_of(flags: str, gpu: float, ram: float) -> Plan:
    """What train.py would print with --plan on such a machine."""
    asked = parse(TrainConfig, flags.split(), about="").config
    recipe = lora_recipe(PRESETS[asked.model].recipe, asked)
    config = parse(TrainConfig, flags.split(), about="", recipe=recipe).config
    ds = resolve_ds_config(ROOT / config.ds, fill=config.ds_sizes(bf16=gpu > 0))
    assert not config.problems()
    return fitted(Job(shape_of(config.model), config, ds, "cuda" if gpu else "cpu"), gpu, ram).plan()


def peaks(plan: Plan) -> tuple[str, str]:
    return f"{plan.peak('gpu') / GIB:.1f}", f"{plan.peak('host') / GIB:.1f}"


@pytest.mark.parametrize(("card", "ram", "flags", "on_card", "in_ram"), RECIPE.findall(PAGE))
def test_a_recipe_fits_its_machine_and_takes_what_the_page_says(monkeypatch, card, ram, flags, on_card, in_ram):
    monkeypatch.chdir(ROOT)
    gpu = 0.0 if card == "none" else float(card)
    plan = plan_of(flags, gpu, float(ram))
    assert fits(plan, gpu, float(ram))
    assert peaks(plan) == (on_card or "0.0", in_ram)


def test_no_row_of_the_page_goes_unread():
    assert len(RECIPE.findall(PAGE)) == len(re.findall(r"^\| (?:none|\d+), \d+ \|", PAGE, re.M)) >= 12
    assert len(KNOB.findall(PAGE)) == len(re.findall(r"^\| `\w+` \|", PAGE, re.M)) >= 12


@pytest.mark.parametrize(("knob", "values", "on_card", "in_ram"), KNOB.findall(PAGE))
def test_a_knob_costs_what_the_page_says(monkeypatch, knob, values, on_card, in_ram):
    monkeypatch.chdir(ROOT)
    for number, value in enumerate(values.split(", ")):
        given = f"ds_configs/{value}" if knob == "ds" else value
        said = (_nth(on_card, number) or BASE_PEAKS[0], _nth(in_ram, number) or BASE_PEAKS[1])
        assert peaks(plan_of(f"{BASE} --{knob} {given}", 16, 32)) == said, value


def _nth(figures: str, number: int) -> str:
    listed = [figure.strip() for figure in figures.split(",")]
    return listed[number] if len(listed) > number else ""
