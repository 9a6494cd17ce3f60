"""Paths among the settings: absolute once read, `~` expanded, wherever they stand; names stay names."""

import json
import os
import shutil
from pathlib import Path

import pytest

from grpo_ds.commands import report
from grpo_ds.commands.ask import QuestionConfig
from grpo_ds.commands.select import SelectConfig
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.models.presets import PRESETS
from grpo_ds.run_folder.resume import flags_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.data_flags import MODEL_NAMES
from grpo_ds.settings.flags import all_flags
from grpo_ds.settings.saved_config import CONFIG_FILE, SYSTEM_PROMPT_FILE, prompt_recipe, split_recipe, write_config
from grpo_ds.settings.shipped import DS_JSONS

pytestmark = pytest.mark.faults("relative paths, ~, a changed working folder")

CONFIGS = {flag.name: config for config in (QuestionConfig, SelectConfig) for flag in all_flags(config)}
PATHS = {
    flag.name for config in (QuestionConfig, SelectConfig) for flag in all_flags(config) if "path" in flag.metadata
}
# (flag, what was typed in a folder with x.json and a folder m, the value; HERE and HOME are those folders)
TYPED = [
    ("output_dir", "runs/a", "HERE/runs/a"),
    ("output_dir", "~/a", "HOME/a"),
    ("output_dir", "../home/a", "HOME/a"),
    ("output_dir", "link/../a", "HOME/a"),  # `..` of a link is its target's, as for the system
    ("output_dir", "/a", "/a"),
    ("output_dir", "auto", "HERE/auto"),
    ("resume_from_checkpoint", "auto", "auto"),
    ("resume_from_checkpoint", "./auto", "HERE/auto"),
    ("resume_from_checkpoint", "~/a/checkpoint-2", "HOME/a/checkpoint-2"),
    ("system_prompt", "x.txt", "HERE/x.txt"),
    ("system_prompt", "~/x.txt", "HOME/x.txt"),
    ("data", "x.json", "HERE/x.json"),
    ("data", "~/x.json", "HOME/x.json"),
    ("data", "sample", "sample"),  # although there is such a file
    ("data", "nowhere.json", "nowhere.json"),  # the error names it as it was typed
    ("data", "qiaojin/PubMedQA", "qiaojin/PubMedQA"),
    ("model", "m", "HERE/m"),
    ("model", "~/m", "HOME/m"),
    ("model", "smollm2-135m", "smollm2-135m"),  # although there is such a folder
    ("model", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
    ("ds", "x.json", "HERE/x.json"),
    ("ds", "~/x.json", "HOME/x.json"),
    ("ds", "zero2.json", "zero2.json"),
    ("ds", "ds_configs/zero2_gpu.json", "HERE/ds_configs/zero2_gpu.json"),  # the user's own
    ("ds", "ds_configs/zero2.json", "ds_configs/zero2.json"),
    ("reward_funcs", "x.py:f,format,~/y.py:g()", "HERE/x.py:f,format,HOME/y.py:g()"),
    ("reward_funcs", "my.module.f", "my.module.f"),
    ("file", "x.json", "HERE/x.json"),
    ("file", "~/x.json", "HOME/x.json"),
    ("file", "-", "-"),  # standard input
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with a home beside it."""
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (here, home):
        (folder / "m").mkdir(parents=True)
        (folder / "x.json").write_text("{}")
    for name in ("smollm2-135m", "sample", "ds_configs"):
        (here / name).mkdir()
    (here / "ds_configs" / "zero2_gpu.json").write_text("{}")
    (here / "link").symlink_to(home / "m")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    return here


@pytest.mark.parametrize(("name", "typed", "value"), TYPED)
def test_a_path_is_absolute_once_read_and_a_name_stays_a_name(here, name, typed, value):
    (here / "run.yaml").write_text(f"{name}: {json.dumps(typed)}\n")
    value = value.replace("HERE", str(here)).replace("HOME", str(here.with_name("home")))
    for argv in (
        ["--config", "run.yaml"],
        [f"--{name}", typed],
        [f"--{name}", value],
    ):  # reading it again changes nothing
        assert parse(CONFIGS[name], argv, about="").given[name] == value


def test_the_table_has_every_flag_that_names_a_file_or_a_folder():
    """If you add one, declare it with path_flag and add it to the table."""
    assert {name for name, *_ in TYPED} == PATHS


def test_every_preset_is_a_name_of_a_model():
    assert set(MODEL_NAMES) == {*PRESETS, "auto"}


def test_the_config_file_and_the_reports_folder_may_lie_in_the_home_folder(here):
    (here.with_name("home") / "run.yaml").write_text("seed: 7\n")
    assert parse(TrainConfig, ["--config", "~/run.yaml"], about="").given == {"seed": 7}
    with pytest.raises(UsageError, match=f"{here.with_name('home')}/run is not a run's folder"):
        report.main(["~/run"])


def test_a_shipped_json_is_its_name_in_a_checkout_too(monkeypatch):
    monkeypatch.chdir(DS_JSONS.folder.parent)
    assert DS_JSONS.setting("ds_configs/zero2.json") == "ds_configs/zero2.json"


def test_a_folder_with_a_comma_does_not_split_a_reward_in_two(tmp_path, monkeypatch):
    (tmp_path / "a, b").mkdir()
    monkeypatch.chdir(tmp_path / "a, b")
    assert parse(TrainConfig, ["--reward_funcs", "x.py:f"], about="").given["reward_funcs"] == "x.py:f"


def test_a_home_folder_of_nobody_is_named_and_not_made_here(here):
    with pytest.raises(UsageError, match="~nobody-here/x: no such user's home folder"):
        parse(TrainConfig, ["--output_dir", "~nobody-here/x"], about="")
    assert parse(TrainConfig, ["--output_dir", "./~"], about="").given == {"output_dir": f"{here}/~"}


def test_a_working_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="working folder no longer exists") as error:
        parse(TrainConfig, ["--output_dir", "run"], about="")
    assert len(str(error.value).splitlines()) <= MAX_LINES


def test_a_saved_config_finds_the_copy_of_its_system_prompt_wherever_it_is_moved(tmp_path):
    (tmp_path / "mine.txt").write_text("Be brief.")
    (tmp_path / "saved").mkdir()
    write_config(TrainConfig(system_prompt=str(tmp_path / "mine.txt")), tmp_path / "saved")
    (tmp_path / "mine.txt").unlink()
    moved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    typed = parse(TrainConfig, ["--config", os.path.relpath(moved / CONFIG_FILE)], about="").given
    for settings in (typed, prompt_recipe(moved), flags_of(moved)):
        assert Path(settings["system_prompt"]) == moved / SYSTEM_PROMPT_FILE


def test_a_model_of_a_version_without_subjects_keeps_its_biomedical_prompt(tmp_path):
    write_config(TrainConfig(system_prompt=""), tmp_path)
    assert prompt_recipe(tmp_path)["system_prompt"] == flags_of(tmp_path)["system_prompt"] == ""
    assert prompt_recipe(tmp_path)["subject"] is None
    older = [line for line in (tmp_path / CONFIG_FILE).read_text().splitlines() if not line.startswith("subject")]
    (tmp_path / CONFIG_FILE).write_text("\n".join(older))
    assert prompt_recipe(tmp_path)["subject"] == flags_of(tmp_path)["subject"] == "biomedical"
    assert "subject" not in split_recipe(tmp_path)  # it must not hide the subject that prompt_recipe knows


def test_a_system_prompt_that_changes_during_a_run_is_saved_as_it_was_read(tmp_path):
    (tmp_path / "mine.txt").write_text("Be brief.")
    config = TrainConfig(system_prompt=str(tmp_path / "mine.txt"))
    assert config.problems() == []
    (tmp_path / "mine.txt").write_text("Be long.")
    write_config(config, tmp_path)
    assert (tmp_path / SYSTEM_PROMPT_FILE).read_text() == "Be brief.\n"
