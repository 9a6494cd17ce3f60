"""docs/flags.md: every flag of train stands there, with the default that the code has."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from grpo_ds.models.presets import PRESETS
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "flags.md").read_text(encoding="utf-8")
DEFAULTS = {it.name: it.default for it in fields(TrainConfig)}
STATED = re.findall(r"`--(\w+) ([^`|\\]+)`", PAGE.partition("| group |")[2])  # a cell with | lists the choices
WORDS = {"data", "system_prompt", "output_dir"}  # what stands behind them says what they take


def test_every_flag_stands_on_the_page_and_no_other():
    assert set(re.findall(r"--(\w+)", PAGE)) - {"config", "print_config", "help"} == DEFAULTS.keys()


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, value in STATED if flag not in WORDS])
def test_a_default_on_the_page_is_the_codes(flag, value):
    assert getattr(parse(TrainConfig, [f"--{flag}", value], about="").unchecked(), flag) == DEFAULTS[flag]


def test_the_first_of_the_choices_is_the_default_or_the_flag_has_none():
    choices = re.findall(r"`--(\w+) (\w+)\\\|", PAGE)
    assert len(choices) > 8
    assert [flag for flag, first in choices if str(DEFAULTS[flag]) not in (first, "None")] == []


def test_the_models_with_defaults_of_their_own_are_named():
    found = re.findall(r"`([\w.-]+)`(?:, has its own defaults)?: `(--[^`]+)`", PAGE)
    given = {model: parse(TrainConfig, shlex.split(flags), about="").given for model, flags in found}
    assert given == {name: preset.recipe for name, preset in PRESETS.items() if preset.recipe}
