"""What a user may write for a flag: null, YAML's own readings, wrong types, lists. The flags make the tables."""

import re
from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.commands.ask import QuestionConfig
from grpo_ds.commands.select import SelectConfig
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.run_folder.resume import flags_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.flags import all_flags
from grpo_ds.settings.saved_config import CONFIG_FILE, OF_ONE_RUN, prompt_recipe, write_config
from grpo_ds.settings.values import is_listed, kind_of, may_be_null

CONFIGS = {flag.name: config for config in (QuestionConfig, SelectConfig) for flag in all_flags(config)}
FLAGS = {flag.name: flag for config in (QuestionConfig, SelectConfig) for flag in all_flags(config)}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
PYTHON = re.compile(r"<class|NoneType|Union|Subtypes|Literal|Traceback|\bstr\b|\bint\b")


def every(chosen=lambda flag: True):
    return pytest.mark.parametrize(
        "flag", [flag for flag in FLAGS.values() if chosen(flag)], ids=lambda flag: flag.name
    )


def is_text(flag):
    return kind_of(flag) is str


def as_path(flag, text):
    """The text, or for a path what tests/settings/test_paths.py says about it."""
    return flag.metadata.get("path", str)(text)


def read(flag, *typed, yaml=None, folder=None):
    """The value of the flag from words on the command line, or from a --config file with this YAML."""
    argv = [f"--{flag.name}", *typed]
    if yaml is not None:
        (folder / "run.yaml").write_text(f"{flag.name}: {yaml}\n", encoding="utf-8")
        argv = ["--config", str(folder / "run.yaml")]
    return parse(CONFIGS[flag.name], argv, about="").given[flag.name]


def refusal(flag, *typed, yaml=None, folder=None):
    """The message that refuses it: names the setting, its file, what is expected and what to do, in few plain lines."""
    with pytest.raises(UsageError) as error:
        read(flag, *typed, yaml=yaml, folder=folder)
    message = str(error.value)
    assert f"  {flag.name} is " in message and "it must be " in message, message
    assert "Correct it or leave it out" in message and len(message.splitlines()) <= MAX_LINES
    assert yaml is None or message.startswith(f"--config {folder / 'run.yaml'}:")
    assert not PYTHON.search(message), message
    choices = get_args(kind_of(flag)) if get_origin(kind_of(flag)) is Literal else ()
    for word in choices or [EXPECTED[kind_of(flag)] if not is_listed(flag) else "a list of texts without a comma"]:
        assert word in message, message
    return message


# null


@every()
def test_null_is_named_where_a_value_is_required(tmp_path, flag):
    for null in ("", "null", "~", "Null", "!!null ''", "# a comment"):
        if may_be_null(flag):
            assert read(flag, yaml=null, folder=tmp_path) is None
        else:
            assert "null or blank" in refusal(flag, yaml=null, folder=tmp_path)


def test_all_nulls_of_a_file_are_counted_in_one_error(tmp_path):
    (tmp_path / "run.yaml").write_text("".join(f"{flag.name}:\n" for flag in all_flags(TrainConfig)))
    required = [flag for flag in all_flags(TrainConfig) if not may_be_null(flag)]
    with pytest.raises(UsageError, match=f"and {len(required) - 3} more"):
        parse(TrainConfig, ["--config", str(tmp_path / "run.yaml")], about="")


@every(may_be_null)
def test_null_can_be_typed_where_it_means_something(flag):
    assert read(flag, "null") is None


@every(lambda flag: not (flag.default == "" or flag.metadata.get("may_be_empty")))
def test_an_empty_text_is_null_as_well(tmp_path, flag):
    """As in --output_dir "$DIR" without a DIR."""
    assert "empty" in refusal(flag, "")
    assert "empty" in refusal(flag, yaml="''", folder=tmp_path)


@every(lambda flag: flag.metadata.get("may_be_empty"))
def test_an_empty_text_may_be_a_setting_of_its_own(tmp_path, flag):
    """No system prompt at all is not the default one."""
    assert flag.name in ("system_prompt", "subject") and flag.default is None
    assert read(flag, "") == read(flag, yaml="''", folder=tmp_path) == ""


# Wrong types, and YAML's own readings.

YAML_READS_IT = ("yes", "no", "on", "off", "true", "1e3", "7", "1.50", "0x10", "017", "12:30", "2020-01-01", ".inf")


@every(is_text)
def test_a_text_is_read_as_written(tmp_path, flag):
    for text in YAML_READS_IT:
        for yaml in (text, f"'{text}'", f"!!str {text}"):
            assert read(flag, yaml=yaml, folder=tmp_path) == read(flag, text) == as_path(flag, text)


@every(lambda flag: kind_of(flag) is bool)
def test_a_switch_has_yamls_words_and_those_of_transformers(tmp_path, flag):
    for words, value in (("true True yes on y 1", True), ("false FALSE no off n 0", False)):
        for word in words.split():
            assert read(flag, word) is read(flag, yaml=word, folder=tmp_path) is value
    assert read(flag) is True


@every(lambda flag: kind_of(flag) in (int, float))
def test_a_number_may_be_a_text(tmp_path, flag):
    assert [read(flag, "-7"), read(flag, yaml="-7", folder=tmp_path), read(flag, yaml="'-7'", folder=tmp_path)] == [
        -7
    ] * 3
    if kind_of(flag) is float:
        assert read(flag, "-1e-3") == read(flag, yaml="-1e-3", folder=tmp_path) == -0.001


@every(lambda flag: get_origin(kind_of(flag)) is Literal)
def test_every_choice_is_read_as_written(tmp_path, flag):
    for choice in get_args(kind_of(flag)):
        assert read(flag, choice) == read(flag, yaml=choice, folder=tmp_path) == choice


@every(lambda flag: not is_text(flag))
def test_a_wrong_type_is_named_with_the_right_one(tmp_path, flag):
    for wrong in ("many", "1.5.2", "[yes, no]", "[]", "{secret: abc}", "12:30", "nan", ".inf", "1e999"):
        assert "abc" not in refusal(flag, yaml=wrong, folder=tmp_path)
        refusal(flag, wrong)


@every(lambda flag: is_text(flag) and not is_listed(flag))
def test_a_list_is_not_a_text(tmp_path, flag):
    for wrong in ("[a, b]", "[]", "{a: b}"):
        refusal(flag, yaml=wrong, folder=tmp_path)
    refusal(flag, "a", "b")


# Lists.


def test_these_flags_are_lists():
    """A flag whose text is split at commas must be a list_flag: if you add one, add it here."""
    assert {flag.name for flag in FLAGS.values() if is_listed(flag)} == {
        *("labels", "units", "reward_funcs", "reward_weights", "lora_target", "report_to"),
    }
    assert [flag.name for flag in FLAGS.values() if "comma" in flag.metadata["help"] and not is_listed(flag)] == []


@every(is_listed)
def test_a_list_and_a_comma_separated_text_are_the_same(tmp_path, flag):
    for yaml in ("[no, -1]", "\n- no\n- '-1'", "no,-1", "'no, -1'", "no , -1", """'["no", -1]'"""):
        assert read(flag, yaml=yaml, folder=tmp_path) == "no,-1"
    for typed in (["no,-1"], ["no", "-1"], ["no,", "-1"], ["no, -1"], ["[no, -1]"], ["['no', '-1']"]):
        assert read(flag, *typed) == "no,-1"


@every(is_listed)
def test_a_list_of_anything_but_texts_is_named(tmp_path, flag):
    for wrong in ("[a, null]", "['yes, sure', no]", "[[a], b]", "[]", "{a: b}"):
        refusal(flag, yaml=wrong, folder=tmp_path)


def test_labels_that_yaml_would_make_booleans_are_the_answers(tmp_path):
    (tmp_path / "run.yaml").write_text("labels: [yes, no]\nreward_weights: [1, 0.5]\nlabel_field: no\nanswer_tag: on\n")
    config = parse(TrainConfig, ["--config", str(tmp_path / "run.yaml")], about="").config()
    assert (config.label_names, config.reward_weights) == (("yes", "no"), "1,0.5")
    assert (config.label_field, config.answer_tag) == ("no", "on")


# What a run saves reads back equal.

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1)
VALUES = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.one_of(st.sampled_from([*YAML_READS_IT, "null", "~", "- a", "a: b", "#", "a\n b", " a "]), TEXTS),
}


def values_of(flag):
    kind = kind_of(flag)
    if get_origin(kind) is Literal:
        values = st.sampled_from(get_args(kind))
    elif is_listed(flag):
        values = st.lists(VALUES[str], min_size=1).map(",".join).filter(lambda text: text.strip(" ,[]"))
        values = values.map(lambda text: ",".join(item.strip() for item in text.strip("[]").split(",")))
    else:
        values = VALUES[kind]
    if "path" in flag.metadata:  # without the home folders of users who do not exist
        values = values.filter(lambda text: "~" not in text).map(lambda text: as_path(flag, text))
    return st.none() | values if may_be_null(flag) else values


SAVED = [flag for flag in all_flags(TrainConfig) if flag.name not in (*OF_ONE_RUN, "system_prompt", "max_steps")]


SOME = st.lists(st.sampled_from(SAVED).flatmap(lambda flag: st.tuples(st.just(flag.name), values_of(flag)))).map(dict)


@settings(max_examples=50, deadline=None)
@given(values=SOME)
def test_a_saved_config_reads_back_equal(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("saved")
    config = replace(TrainConfig(), **values)
    write_config(config, folder)
    assert parse(TrainConfig, ["--config", str(folder / CONFIG_FILE)], about="").unchecked() == config
    for again in (flags_of(folder), prompt_recipe(folder)):
        assert {name: getattr(config, name) for name in again} == again
