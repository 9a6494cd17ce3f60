"""docs/the_recipe.md: its settings are ours, its rewards are what two rules pay, its tables are what is computed."""

import re
from dataclasses import fields
from math import comb
from pathlib import Path

import pytest

from benchmarks.parsers import rows
from grpo_ds.models.presets import PRESETS
from grpo_ds.report.lax import STRICT
from grpo_ds.settings.config import TrainConfig
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.lax import PARSERS
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import correctness, tag_pairs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "the_recipe.md").read_text(encoding="utf-8")
FORMAT = AnswerFormat(("yes", "no"))
TAGS = (*FORMAT.reasoning_pair, *FORMAT.answer_pair)
DEFAULT = re.compile(r"^\| [^|]+ \|[^|]+\| `--(\w+) ([^` ]+)`", re.M)  # in the last column of the tables of settings
REWARD = re.compile(r"^\| `([^`]+)` \| (yes|no) \| ([\d.]+) \| ([\d.]+) \|$", re.M)
ANSWER = re.compile(r"^\| ([^|`]+) \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+%) \|$", re.M)


@pytest.mark.parametrize(("flag", "value"), DEFAULT.findall(PAGE))
def test_a_setting_of_ours_is_the_default(flag, value):
    default = {it.name: it.default for it in fields(TrainConfig)}[flag]
    assert type(default)(value) == default


def test_the_rows_of_the_tables_are_read():
    assert len(DEFAULT.findall(PAGE)) >= 16 and len(REWARD.findall(PAGE)) == 6 and len(ANSWER.findall(PAGE)) == 9


def the_scripts_reward(completion, label):
    """2 for the right label, and 0.2 for each tag, wherever they are."""
    answer = "yes" if "yes" in completion else "no" if "no" in completion else None
    return 2.0 * (answer == label) + 0.2 * sum(tag in completion for tag in TAGS)


@pytest.mark.parametrize(("completion", "label", "theirs", "ours"), REWARD.findall(PAGE))
def test_a_completion_earns_what_the_page_says(completion, label, theirs, ours):
    assert f"{the_scripts_reward(completion, label):.1f}" == theirs
    right = correctness([completion], [label], answer_format=FORMAT, reward=TrainConfig.correctness_reward)
    form = tag_pairs([completion], answer_format=FORMAT, reward=TrainConfig.format_reward)
    assert f"{right[0] + form[0]:.1f}" == ours


def test_the_table_of_answers_without_a_model_is_what_the_parsers_read():
    labels = ["yes"] * 276 + ["no"] * 169
    questions = [Question(str(i), f"Is it {i}?", "It is not.", label) for i, label in enumerate(labels)]
    assert [list(row) for row in ANSWER.findall(PAGE)] == rows(questions, FORMAT)


def test_the_parsers_are_explained_in_their_order():
    (table,) = re.findall(r"^\| parser \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
    named = re.findall(r"^\| `(\w+)` \| ([^|(]+)", table, re.M)
    assert [name for name, _ in named] == ["strict", *PARSERS]
    assert named[0][1].strip() == STRICT


def test_the_shares_of_yes_are_computed():
    assert f"{276 / 445:.1%}".replace("%", " %") in PAGE and f"{276 / 500:.1%}".replace("%", " %") in PAGE
    chance = [comb(276, yes) * comb(169, 100 - yes) / comb(445, 100) for yes in range(101)]
    assert sum(chance[54:71]) == pytest.approx(0.95, abs=0.005) and "54 to 70" in PAGE
    assert sum(chance[78:]) == pytest.approx(1e-4, rel=0.01) and "1 of 10,000" in PAGE


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"])
def test_the_scripts_memory_is_twenty_bytes_a_parameter(model):
    assert f"{20 * PRESETS[model].parameters / 2**30:.1f}" in PAGE
