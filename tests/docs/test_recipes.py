"""docs/recipes.md and less_memory.md: every recipe fits its machine, and every figure is the plan's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds.memory.plan import GIB, Plan
from grpo_ds.memory.select import Job, fits, fitted
from grpo_ds.models.presets import PRESETS, recipe_for
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COSTS = (ROOT / "docs" / "less_memory.md").read_text(encoding="utf-8")
RECIPE = re.compile(r"^\| (none|\d+), (\d+) \| [^|]+ \| `([^`]+)` \| ([\d.]*) ?\| ([\d.]+) \|$", re.M)
FLAG = re.compile(r"^\| `(\w+)` \| ([^|]+) \|([^|]*)\|([^|]*)\|", re.M)
BASE = "--model qwen2.5-1.5b --batch_size 4 --num_generations 8 --gradient_checkpointing true"
BASE_PEAKS = "7.9", "16.9"


def plan_of(flags: str, gpu: float, ram: float) -> Plan:
    """Return the plan that train.py would print with --plan on such a machine."""
    parsed = parse(TrainConfig, flags.split(), about="")
    asked = parsed.unchecked()
    config = parsed.config(recipe_for(PRESETS[asked.model].recipe, asked))
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
    assert len(FLAG.findall(COSTS)) == len(re.findall(r"^\| `\w+` \|", COSTS, re.M)) >= 12


@pytest.mark.parametrize(("flag", "values", "gpu_peaks", "ram_peaks"), FLAG.findall(COSTS))
def test_a_flag_costs_what_the_page_says(monkeypatch, flag, values, gpu_peaks, ram_peaks):
    monkeypatch.chdir(ROOT)
    for number, value in enumerate(values.split(", ")):
        given = f"ds_configs/{value}" if flag == "ds" else value
        on_the_page = (_nth(gpu_peaks, number) or BASE_PEAKS[0], _nth(ram_peaks, number) or BASE_PEAKS[1])
        assert peaks(plan_of(f"{BASE} --{flag} {given}", 16, 32)) == on_the_page, value


def _nth(figures: str, number: int) -> str:
    listed = [figure.strip() for figure in figures.split(",")]
    return listed[number] if len(listed) > number else ""


def test_the_reward_and_the_prompt_of_the_page_train_a_model(tiny_folder, tmp_path):
    blocks = {kind: re.search(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S)[1] for kind in ("json", "python")}
    (tmp_path / "my_rewards.py").write_text(blocks["python"])
    (tmp_path / "data.jsonl").write_text("\n".join(blocks["json"].replace("Aspirin", name) for name in "ABCDEFGH"))
    small = {
        "num_steps": 1,
        "num_generations": 2,
        "batch_size": 1,
        "max_completion_length": 4,
        "max_prompt_length": 400,
    }
    flags = {"model": tiny_folder, "data": "data.jsonl", "output_dir": "run", "report_to": "none", **small}
    config = ["--config", str(ROOT / "configs/summaries-laptop.yaml")]
    command = [sys.executable, str(ROOT / "launch/train.py"), *config, *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert -3 < line["rewards/about_30_words/mean"] < 1 and "accuracy" not in line


def test_the_reward_of_the_page_pays_thirty_words():
    scope = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE, re.M | re.S)[1], scope)
    assert scope["about_30_words"](["word " * 30, "word " * 15, ""]) == [1.0, 0.5, 0.0]


def test_the_pages_say_one_range_of_cards():
    names = (
        "README.md",
        "setup.cfg",
        "ds_configs/README.md",
        *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    )
    others = {"docs/the_recipe.md"}  # of another project
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names if name not in others}
    found = {name: least for name, text in texts.items() if (least := re.findall(r"(\d+)(?:-| to )24 GB", text))}
    assert found == {name: ["16"] for name in ("README.md", "setup.cfg", "ds_configs/README.md", "docs/comparison.md")}
