"""`eval`: which questions it asks a model that was trained here; how it grades; its two streams."""

import json
from dataclasses import fields

import pytest

from grpo_ds.commands import evaluate
from grpo_ds.commands.evaluate import GradingConfig, main, prepare
from grpo_ds.commands.settle import split_for_training, subject_of
from grpo_ds.errors import MAX_LINES, DataError, UsageError
from grpo_ds.run_folder.trained_on import TRAINED_ON_FILE, write_trained_on
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import CONFIG_FILE, write_config
from grpo_ds.task.grading import ClassGrades
from grpo_ds.task.lax import PARSERS
from grpo_ds.task.questions import Question, QuestionSet, fingerprint, not_among, read_questions, split_questions

SAMPLE = read_questions("sample")  # 80 yes, 80 no
TRAIN, HELD_OUT = split_questions(SAMPLE.questions, eval_fraction=0.1, seed=3)
KNOWN = {fingerprint(question) for question in TRAIN}


@pytest.fixture
def trained(tmp_path):
    """What a run with --seed 3 --eval_fraction 0.1 leaves beside its model."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(TrainConfig(data="sample", seed=3, eval_fraction=0.1), folder)
    write_trained_on(folder, KNOWN)
    return folder


def asked(folder, *words, data="sample"):
    return prepare(["--model", str(folder), "--data", str(data), *words])[2]


def records(file, questions, spelled=lambda text: text):
    file.write_text(
        json.dumps(
            [
                {"question": spelled(q.text), "context": q.context, "ground_truth": q.label, "id": f"other {n}"}
                for n, q in enumerate(questions)
            ]
        )
    )
    return file


# (typed flags, questions asked, of these trained on, left out)
ASKED = [
    ([], 16, 0, 144),  # what the run held out
    (["--seed", "0"], 16, 0, 144),  # in another order
    (["--eval_limit", "5"], 5, 0, 144),
    (["--eval_fraction", "0.05"], 8, 0, 144),  # a smaller share of the held-out questions
    (["--eval_fraction", "0.2", "--seed", "0"], 16, 0, 144),  # 32 wanted, but no question that was trained on
    (["--eval_fraction", "1"], 160, 144, 0),  # asked for, and said
]


@pytest.mark.parametrize(("typed", "count", "known", "left_out"), ASKED)
def test_no_question_that_was_trained_on_is_asked_unless_all_are_asked_for(trained, typed, count, known, left_out):
    found = asked(trained, *typed)
    assert (len(found.questions), found.trained_on, found.left_out) == (count, known, left_out)
    assert len(found.questions) - len(not_among(KNOWN, found.questions)) == known
    assert ("144, which the model was trained on, are left out" in found.described()) == bool(left_out)
    assert ("Warning: the model was trained on 144 of these questions." in found.described()) == bool(known)


def test_the_runs_own_held_out_questions_are_asked_in_the_runs_order(trained):
    assert asked(trained).questions == HELD_OUT


def test_a_file_that_the_run_never_saw_is_asked_whole(trained, tmp_path):
    new = records(tmp_path / "new.json", SAMPLE.questions, spelled=lambda text: f"And now: {text}")
    found = asked(trained, data=new)
    assert (len(found.questions), found.trained_on, found.left_out) == (160, 0, 0)


def test_known_questions_are_found_in_another_file_with_other_ids_and_spelling(trained, tmp_path):
    mixed = [*TRAIN[:10], *HELD_OUT[:4]]
    file = records(tmp_path / "mixed.json", mixed, spelled=lambda text: text.upper().replace(" ", "  "))
    found = asked(trained, data=file)
    assert (len(found.questions), found.left_out) == (4, 10)


def test_nothing_left_to_ask_is_an_error_with_two_remedies(trained, tmp_path):
    file = records(tmp_path / "known.json", TRAIN[:9])
    for typed in ([], ["--eval_fraction", "0.3"]):
        with pytest.raises(DataError, match=r"(?s)none is left to ask.*--eval_fraction 1") as caught:
            asked(trained, *typed, data=file)
        assert len(str(caught.value).splitlines()) <= MAX_LINES
    assert asked(trained, "--eval_fraction", "1", data=file).trained_on == 9


def test_a_model_of_an_older_version_is_asked_what_its_seed_and_share_held_out(trained):
    (trained / TRAINED_ON_FILE).unlink()
    found = asked(trained)
    assert (found.questions, found.trained_on, found.left_out) == (HELD_OUT, None, None)


def test_any_other_model_is_asked_the_default_share(tmp_path):
    _, held_out = split_questions(SAMPLE.questions, eval_fraction=0.2, seed=0)
    assert asked(tmp_path).questions == held_out


def test_a_damaged_share_beside_the_model_is_named(trained):
    file = trained / CONFIG_FILE
    file.write_text(file.read_text().replace("eval_fraction: 0.1", "eval_fraction: few"))
    with pytest.raises(UsageError, match=r"eval_fraction"):
        asked(trained)


def test_training_further_holds_out_nothing_that_was_trained_on_before():
    train, held_out = split_for_training(TrainConfig(model="run"), SAMPLE, KNOWN)
    assert {q.id for q in held_out} == {q.id for q in HELD_OUT} and len(train) == len(TRAIN)
    assert split_for_training(TrainConfig(), SAMPLE, ()) == split_questions(SAMPLE.questions, eval_fraction=0.2, seed=0)


def test_a_resumed_run_with_its_own_record_has_the_same_parts():
    config = TrainConfig(eval_fraction=0.3, seed=5)
    for before in ((), KNOWN):
        train, held_out = split_for_training(config, SAMPLE, before)
        assert split_for_training(config, SAMPLE, {*before, *map(fingerprint, train)}) == (train, held_out)


def test_training_further_on_known_questions_alone_names_two_remedies():
    known = {fingerprint(question) for question in SAMPLE.questions}
    with pytest.raises(DataError, match=r"(?s)none can be held out.*run/trained_on\.txt") as caught:
        split_for_training(TrainConfig(model="run"), SAMPLE, known)
    assert len(str(caught.value).splitlines()) <= MAX_LINES


# --- strict and lax parsers --------------------------------------------------------------------------


def printed(folder, capsys, *words):
    """Return the lines that `eval` prints, and the figures that --json puts on stdout."""
    capsys.readouterr()
    few = ["--data", "sample", "--eval_limit", "4", "--max_prompt_length", "480", "--max_completion_length", "4"]
    main(["--model", str(folder), *few, *words, "--json"])
    found = capsys.readouterr()
    return found.err, json.loads(found.out)


def test_lax_figures_stand_beside_the_strict_ones(tiny_folder, capsys):
    lines, strict = printed(tiny_folder, capsys)
    assert "lax" not in strict and "lax" not in lines
    lines, both = printed(tiny_folder, capsys, "--grading", "lax")
    lax = both.pop("lax")
    assert both == strict and {field.name for field in fields(ClassGrades)} <= both.keys()
    assert [*lax] == [*PARSERS]
    shown = [line.split()[0] for line in lines.splitlines() if line.startswith("  ")]
    assert [word for word in shown if word in ("strict", *PARSERS)] == ["strict", *PARSERS]


def test_the_prompt_of_each_question_is_read_with_its_answer(tiny_folder, capsys, tmp_path):
    """Our prompt names the labels; one that does not leaves those that a question names itself."""
    _, report = printed(tiny_folder, capsys, "--grading", "lax")
    assert report["lax"]["any_label_with_prompt"]["predicted"] == {"yes": 4, "no": 0}
    (tmp_path / "prompt.txt").write_text("Say what it is.")
    texts = iter([f"Number {n}, {'yes' if n < 5 else 'say'}?" for n in range(20)])
    data = records(tmp_path / "data.json", SAMPLE.questions[:20], spelled=lambda _: next(texts))
    words = ["--system_prompt", str(tmp_path / "prompt.txt"), "--context_field", "none", "--eval_fraction", "1"]
    _, report = printed(tiny_folder, capsys, "--grading", "lax", "--data", str(data), *words, "--eval_limit", "20")
    assert report["lax"]["any_label"]["predicted"] == {"yes": 0, "no": 0}
    assert report["lax"]["any_label_with_prompt"]["predicted"] == {"yes": 5, "no": 0}


def test_a_second_model_is_asked_the_same_and_compared_in_pairs(formed_folder, tiny_folder, capsys):
    lines, alone = printed(formed_folder, capsys)
    lines, both = printed(formed_folder, capsys, "--compare_with", str(tiny_folder))
    other = both.pop("compared_with")
    assert other.pop("model") == str(tiny_folder) and other.keys() == alone.keys() - {
        "trained_on", "left_out_as_trained_on"
    }  # fmt: skip
    _, second = printed(tiny_folder, capsys, *["--prefill", "false", "--few_shot", "0"])
    assert other["mean_p_right"] == second["mean_p_right"] != alone["mean_p_right"]
    tests = {name: both.pop(name) for name in both.keys() - alone.keys()}
    assert both == alone and tests.keys() == {
        "mcnemar", "p_right_change", "p_right_change_interval", "p_right_p_value"
    }  # fmt: skip
    assert tests["p_right_change"] == pytest.approx(alone["mean_p_right"] - other["mean_p_right"])
    assert formed_folder.name in lines and "paired test p" in lines


def test_a_second_model_that_is_not_there_is_named_before_the_first_is_asked(tiny_folder, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"--compare_with .*nowhere") as caught:
        main(["--model", str(tiny_folder), "--data", "sample", "--compare_with", str(tmp_path / "nowhere")])
    assert "Evaluation" not in capsys.readouterr().err and len(str(caught.value).splitlines()) <= MAX_LINES
    with pytest.raises(UsageError, match="compare_with is auto; name a model"):
        main(["--model", str(tiny_folder), "--compare_with", "auto"])


def test_training_knows_no_lax_parser():
    with pytest.raises(UsageError, match="--grading: "):
        parse(TrainConfig, ["--grading", "lax"], about="")


def test_progress_of_an_evaluation_is_not_among_its_results(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("grpo_ds.report.long_work.SILENCE", 0)  # a line after every token
    flags = ["--eval_limit", "3", "--max_prompt_length", "700", "--max_completion_length", "4"]
    evaluate.main(["--model", str(tiny_folder), "--data", "sample", *flags])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("Evaluation: ")]
    assert lines[0] == "Evaluation: 3 questions to do" and lines[-1].startswith("Evaluation: 3 of 3 questions, ")
    assert "Evaluation:" not in printed.out and "{" not in printed.out
    assert "Held-out questions (3, greedy)" in printed.out and "macro-F1" in printed.out  # train's table
    assert "Ill-formed: 3 x cut at --max_completion_length" in printed.out


@pytest.mark.parametrize(
    ("data", "columns", "given", "subject"),
    [
        ("sample", {}, None, "biomedical"),
        (None, {}, None, "biomedical"),  # the sample, too
        ("qiaojin/PubMedQA", {}, None, "biomedical"),
        ("/data/pubmedqa_500.json", {}, None, "biomedical"),
        ("/data/mine.json", {"final_decision": "yes"}, None, "biomedical"),  # PubMedQA's field
        ("/data/mine.json", {}, None, ""),
        ("/pubmedqa/mine.json", {}, None, ""),  # a folder's name says nothing
        ("/data/mine.json", {}, "chess", "chess"),
        ("sample", {}, "", ""),
    ],
)
def test_questions_are_called_biomedical_only_if_they_are(data, columns, given, subject, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = QuestionSet((Question("1", "Is it?", "", "yes", columns=columns),), "mine: 1 question", {})
    assert subject_of(given, data, found) == subject


def test_eval_needs_rewards_where_no_answer_is_right():
    with pytest.raises(UsageError, match="only rewards can grade: --reward_funcs"):
        parse(GradingConfig, ["--answers", "none"], about="").config()
    with pytest.raises(UsageError, match="grading lax reads answers"):
        words = ["--answers", "none", "--grading", "lax", "--reward_funcs", "format"]
        parse(GradingConfig, words, about="").config()
    with pytest.raises(UsageError, match="reasoning_gain, which only training measures"):
        parse(GradingConfig, ["--reward_funcs", "reasoning_gain"], about="").config()
