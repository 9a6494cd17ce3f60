"""Flags in groups, and the order in which defaults, recipes and typed flags win."""

import re
from pathlib import Path

import pytest

from grpo_ds.commands.ask import QuestionConfig
from grpo_ds.commands.evaluate import GradingConfig
from grpo_ds.commands.select import SelectConfig
from grpo_ds.commands.settle import settle, with_epochs
from grpo_ds.errors import MAX_LINES, CheckpointError, UsageError
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.run_folder.resume import flags_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import AskConfig, EvaluateConfig, TrainConfig
from grpo_ds.settings.flags import HEADINGS, Flags, all_flags, flags_by_heading
from grpo_ds.settings.saved_config import CONFIG_FILE

LAPTOP = PRESETS[EMBEDDED].recipe


def test_labels_and_fields_are_compared_in_one_unicode_form():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for twice in (f"{composed},{decomposed.upper()}", f"{composed},{decomposed}", "\u00e9,\u00c9", "yes,yes"):
        _, *problems = error_of(parse(TrainConfig, ["--labels", twice], about="").config).splitlines()
        assert [line.strip() for line in problems] == [f"labels is {twice}, which has one answer twice"]
    flags = ["--question_field", composed, "--label_field", decomposed]
    assert "must name different fields" in error_of(parse(TrainConfig, flags, about="").config)
    config = parse(TrainConfig, ["--labels", f"{decomposed},no", "--label_field", decomposed], about="").config()
    assert config.label_names == (decomposed, "no") and config.field_names == {"label": composed}


def help_of(config_type, capsys):
    with pytest.raises(SystemExit):
        parse(config_type, ["--help"], about="What it does.")
    return capsys.readouterr().out


def error_of(build) -> str:
    with pytest.raises(UsageError) as error:
        build()
    assert len(str(error.value).splitlines()) <= MAX_LINES
    return str(error.value)


@pytest.mark.parametrize(
    ("config_type", "headings"),
    [
        (TrainConfig, [*HEADINGS]),
        (GradingConfig, ["grading", "model", "data", "prompt", "memory"]),
        (AskConfig, ["model", "data", "prompt"]),
        (SelectConfig, ["machine", *HEADINGS]),
        (QuestionConfig, ["questions", "model", "data", "prompt"]),
    ],
)
def test_help_shows_the_flags_below_headings(config_type, headings, capsys):
    shown = help_of(config_type, capsys)
    assert re.match(r"usage: \S+ \[options\]\n\nWhat it does\.", shown)
    assert re.findall(r"^(\w+):$", shown, re.M) == ["options", *headings]
    for heading, flags in flags_by_heading(config_type).items():
        below = shown.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  --(\w+)", below, re.M) == [flag.name for flag in flags]


def test_help_keeps_the_command_of_a_description_on_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], about="What it\ndoes.\n\n    a --command\n\nMore.")
    assert "\n\nWhat it does.\n\n    a --command\n\nMore.\n" in capsys.readouterr().out


def test_every_flag_is_in_one_group_and_has_a_line_of_help():
    names = [flag.name for flag in all_flags(TrainConfig)]
    assert len(names) == len(set(names)) == 98
    assert set(flags_by_heading(TrainConfig)) == set(HEADINGS)
    assert all(flag.metadata["help"] for flag in all_flags(TrainConfig))


def test_every_group_reports_its_problems():
    """A group that forgets super() would hide the problems of the groups behind it."""
    wrong = TrainConfig(
        labels="yes", max_prompt_length=0, eval_limit=0, num_steps=0, reward_timeout=-1, beta=-1, mu=0,
        ref_model_sync_steps=0, lora_alpha=0, logprob_chunk_mib=0, generation_batch_size=0, save_steps=-1,
        max_bad_steps=-1, few_shot=-1, overlong_buffer=-1,
    )  # fmt: skip
    changed = [flag.name for flag in all_flags(TrainConfig) if getattr(wrong, flag.name) != flag.default]
    assert len(changed) == 15 and [name for name in changed if name not in " ".join(wrong.problems())] == []
    groups = [group for group in TrainConfig.__mro__ if issubclass(group, Flags) and "problems" in vars(group)]
    assert [group for group in groups if group is not Flags and not set(changed) & vars(group).keys()] == [
        TrainConfig,  # overlong_buffer: what concerns several groups
        EvaluateConfig,  # eval_misled and eval_samples beside answers
        AskConfig,  # few_shot
    ]


# Defaults < recipe < typed < decided by the command.


def test_typed_flags_win_over_a_recipe_and_a_recipe_over_defaults():
    parsed = parse(TrainConfig, ["--num_steps", "7"], about="")
    config = parsed.config({"num_steps": 14, "max_completion_length": 48, "no_flag_of_ours": 1}, model="mine")
    assert (config.num_steps, config.max_completion_length, config.seed, config.model) == (7, 48, 0, "mine")
    assert parsed.typed == {"num_steps"}


def test_a_recipe_gives_way_to_the_kind_of_the_answers_and_to_a_warm_up_of_ones_own():
    def settings(*argv):
        return parse(TrainConfig, [*argv], about="").config(LAPTOP)

    usual = settings()
    assert (usual.reward_funcs, usual.prefill, usual.few_shot) == ("correctness,format,bare_label", True, 2)
    assert (usual.warmup_steps, usual.warmup_ratio) == (4, 0.0)
    numbers = settings("--answers", "number", "--warmup_ratio", "0.5")
    assert (numbers.reward_funcs, numbers.warmup_steps, numbers.warmup_ratio) == ("correctness,format", 0, 0.5)
    prompts = settings("--answers", "none", "--reward_funcs", "rewards.py:mine")
    assert (prompts.reward_funcs, prompts.prefill) == (str(Path("rewards.py").resolve()) + ":mine", False)


def test_the_length_of_a_run_may_be_said_with_trls_flags(tmp_path):
    (tmp_path / "a.yaml").write_text("num_steps: 40\nnum_iterations: 1\n")
    parsed = parse(TrainConfig, ["--config", str(tmp_path / "a.yaml"), "--max_steps", "7"], about="")
    for config in (parsed.config(), parsed.config(LAPTOP)):
        assert (config.num_steps, config.max_steps, config.total_steps) == (7, None, 7)
    config = parse(TrainConfig, ["--num_train_epochs", "1.5"], about="").config(LAPTOP)
    assert config.num_train_epochs == 1.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_steps", "7", "--num_steps", "7"], "num_steps and max_steps both say"),
        (["--max_steps", "7", "--num_train_epochs", "1"], "max_steps and num_train_epochs both say"),
        (["--max_steps", "7", "--num_iterations", "2"], "max_steps is for one iteration"),
        (["--max_steps", "0"], "num_steps must be 1 or more"),
        (["--num_train_epochs", "0"], "num_train_epochs is 0.0; it must be more than 0"),
        (["--warmup_steps", "1", "--warmup_ratio", "0.1"], "warmup_steps and warmup_ratio exclude each other"),
        (["--warmup_steps", "-1"], "warmup_steps must be"),
        (["--warmup_ratio", "10"], "warmup_ratio must be a share"),
    ],
)
def test_a_length_or_a_warm_up_that_cannot_be_is_named(argv, words):
    assert words in error_of(parse(TrainConfig, argv, about="").config)


def test_epochs_become_steps_when_the_questions_are_counted(monkeypatch):
    """2 epochs of 33 questions, 2 a step: 33 steps; on 3 ranks 11. A share of them is warm-up, of mu updates each."""
    monkeypatch.setattr("grpo_ds.commands.settle.gpu_memory_gib", lambda: None)
    flags = ["--num_train_epochs", "2", "--warmup_ratio", "0.1", "--mu", "2", "--lr_scheduler_type", "linear"]
    settled = settle(["--model", EMBEDDED, "--batch_size", "2", *flags])
    assert with_epochs(settled, 33).config.num_steps == 33
    assert with_epochs(settled, 33).config.num_train_epochs is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = with_epochs(settled, 33)
    assert (done.config.num_steps, done.job.config.num_steps) == (11, 11)
    assert (done.job.ds.total_steps, done.job.ds.warmup_steps, done.job.ds.schedule) == (22, 3, "linear")
    assert with_epochs(settle(["--model", EMBEDDED]), 33).config.num_steps == LAPTOP["num_steps"]


def test_values_are_checked_with_the_recipe_and_not_before():
    parsed = parse(TrainConfig, ["--pack_tokens", "600"], about="")
    assert "may have 1067" in error_of(parsed.config)  # of 768 + 300 tokens
    assert parsed.config(LAPTOP).pack_tokens == 600  # of 512 + 48
    parsed = parse(TrainConfig, ["--overlong_buffer", "100"], about="")
    assert parsed.config().overlong_buffer == 100
    assert "overlong_buffer is 100" in error_of(lambda: parsed.config(LAPTOP))


def test_train_checks_the_values_that_the_model_gets(monkeypatch):
    monkeypatch.setattr("grpo_ds.commands.settle.gpu_memory_gib", lambda: None)
    assert settle(["--model", EMBEDDED, "--pack_tokens", "600"]).config.pack_tokens == 600
    assert "overlong_buffer is 100" in error_of(lambda: settle(["--model", EMBEDDED, "--overlong_buffer", "100"]))
    # With a GPU, auto first means a Qwen at the default lengths.
    monkeypatch.setattr("grpo_ds.commands.settle.gpu_memory_gib", lambda: 16.0)
    assert "may have 1067" in error_of(lambda: settle(["--pack_tokens", "600"]))


def test_typed_flags_win_over_a_file_in_any_order_and_a_later_file_over_an_earlier(tmp_path):
    (tmp_path / "a.yaml").write_text("num_steps: 3\nbeta: 0.1\nmu: 2\n")
    (tmp_path / "b.yaml").write_text("num_steps: 4\nbeta: 0.2\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    for argv in (["--beta", "0", *files], [*files, "--beta", "0"]):
        config = parse(TrainConfig, argv, about="").config()
        assert (config.num_steps, config.beta, config.mu) == (4, 0.0, 2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["my_questions.json"], ["my_questions.json: belongs to no flag"]),
        (["--num_steps"], ["num_steps is empty; it must be a whole number"]),
        (["--num_steps", "3", "4"], ["num_steps is ['3', '4']; it must be a whole number"]),
        (["--prefill", "my.json"], ["prefill is 'my.json'; it must be true or false"]),
        (["--config"], ["--config names no file"]),
        (["--config="], ["--config names no file"]),
        (["--learning_rate", "\u0661"], ["learning_rate is"]),  # a digit of another script
        (["--"], ["--: belongs to no flag"]),
    ],
)
def test_words_that_make_no_sense_are_named(argv, words):
    message = error_of(lambda: parse(TrainConfig, argv, about=""))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ("num_steps: many\n", ["num_steps is 'many'"]),
        ("reference: int4\nepsilon_high: wide\n", ["one of auto, int8, streamed, llm.int8", "epsilon_high is 'wide'"]),
        ("loss_type:\nseed: null\n", ["loss_type is null", "seed is null"]),
        ("no_flag_of_ours: 1\nmu:\n", ["mu is null"]),
    ],
)
def test_settings_saved_with_a_checkpoint_are_read_like_a_config_file(tmp_path, saved, words):
    (tmp_path / CONFIG_FILE).write_text(saved)
    with pytest.raises(CheckpointError) as error:
        flags_of(tmp_path)
    message = str(error.value)
    assert [word for word in [str(tmp_path / CONFIG_FILE), *words] if word not in message] == [], message
    assert "no_flag_of_ours" not in message and len(message.splitlines()) <= MAX_LINES
