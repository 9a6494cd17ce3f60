"""Answers that are a number or a text, and completions without a right answer: what is read, and what is right."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.errors import DataError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import broken_rule
from grpo_ds.task.earned import earned
from grpo_ds.task.grading import ClassGrades, count_votes, evaluation_metrics, grade_answers, graded
from grpo_ds.task.lax import accepted_anywhere, last_number, lax_grades
from grpo_ds.task.questions import Question, read_questions
from grpo_ds.task.rewards import ready_made
from grpo_ds.task.scoring import Rewards, columns_for_rewards, columns_of, score
from grpo_ds.task.spelling import text_key
from tests.faults.ill_formed import by_the_spelling, by_the_tags

NUMBER, TEXT, NONE = (AnswerFormat(kind=kind) for kind in ("number", "text", "none"))
OPEN = [(NUMBER, "42"), (TEXT, "Paris"), (NONE, "Paris")]  # with a right answer to write

SAME_TEXT = [
    ("Paris", "Paris"),
    ("paris", "Paris"),  # case
    ("PARIS", "Paris"),
    ("STRASSE", "Straße"),
    ("cafe\u0301", "caf\u00e9"),  # the Unicode form
    (" Paris\n", "Paris"),  # white space
    ("New\n  York", "New York"),
    ("New\u00a0York", "New York"),
    ("Paris.", "Paris"),  # a full stop
    ("Paris!", "Paris"),  # other punctuation
    ('"Paris"', "Paris"),
    ("\u201cParis\u201d", "Paris"),
    ("(Paris)", "Paris"),
    ("Paris, France", "Paris France"),
    ("Paris,France", "Paris, France"),
    ("U.S.A.", "USA"),  # full stops vanish
    ("O\u2019Neill", "O'Neill"),  # so do apostrophes, straight or not
    ("ONeill", "O'Neill"),
    ("well-known", "well known"),  # a hyphen parts words
    ("COVID-19", "covid 19"),
    ("AC/DC", "ac dc"),
    ("Vitamin C:", "vitamin c"),
    ("St. John", "St John"),
    ("3.5 mg", "3.5 mg."),
    ("1,000 men", "1,000 men"),
    ("\u6771\u4eac\u3002", "\u6771\u4eac"),
]
OTHER_TEXT = [
    ("Pari", "Paris", "a letter is missing"),
    ("Paris France", "Paris", "more than the answer"),
    ("the Paris", "Paris", "an article is a word"),
    ("Paris Paris", "Paris", "said twice"),
    ("Paris or London", "Paris", "two answers"),
    ("cafe", "caf\u00e9", "another letter"),
    ("N ew York", "New York", "a word cut in two"),
    ("NewYork", "New York", "two words in one"),
    ("35 mg", "3.5 mg", "a decimal point is no punctuation"),
    ("3,5", "35", "nor is a comma in a number"),
    ("5", "-5", "nor is a minus sign"),
    ("5", ".5", "nor is a point in front"),
    ("12", "1/2", "nor is a slash in a fraction"),
    ("1 2", "1/2", "nor does it part words"),
    ("10:30", "1030", "nor is a colon in a time"),
    ("50", "50%", "a percent sign means something"),
    ("C", "C#", "so does this one"),
    ("C", "C++", "and this one"),
    ("Q A", "Q&A", "and this one"),
    ("**Paris**", "Paris", "markup"),
    ("Par\u200bis", "Paris", "a zero-width space inside"),
    ("P\u0430ris", "Paris", "a letter that only looks alike"),
    ("\uff30aris", "Paris", "a full-width letter"),
]
NO_TEXT = ["", " ", ".", "...", "?!", "\u2026", "'"]


def answer(form, text, reasoning="It is."):
    return form.parse(f"<reasoning>{reasoning}</reasoning><answer>{text}</answer>").answer


@pytest.mark.parametrize(("written", "accepted"), SAME_TEXT)
def test_a_text_is_right_in_any_case_punctuation_and_white_space(written, accepted):
    assert TEXT.is_right(answer(TEXT, written), [accepted]) and TEXT.is_right(answer(TEXT, accepted), [written])


@pytest.mark.parametrize(("written", "accepted", "why"), OTHER_TEXT)
def test_another_text_is_wrong(written, accepted, why):
    assert answer(TEXT, written) is not None and not TEXT.is_right(answer(TEXT, written), [accepted]), why


@pytest.mark.parametrize("written", NO_TEXT)
def test_a_text_without_a_word_is_no_answer(written):
    assert answer(TEXT, written) is None


def test_each_accepted_text_is_right_and_no_other():
    for written, right in (("UK", True), ("the united kingdom", True), ("Britain", False), ("", False)):
        assert TEXT.is_right(answer(TEXT, written), ["UK", "The United Kingdom", ""]) is right


@settings(deadline=None)  # the cores are shared
@given(st.text(max_size=20))
def test_the_key_of_a_text_is_its_own_key(text):
    key = text_key(text)
    assert text_key(key) == key and text_key(text.upper().upper()) == text_key(text.upper())


@pytest.mark.parametrize(
    ("written", "read", "right"),
    [
        ("42", "42", True),
        (" 42.0 ", "42", True),
        ("$42", "42", True),
        ("84/2.", "42", True),
        ("4200%", "42", True),
        ("43", "43", False),
        ("forty-two", None, False),
        ("42 or 43", None, False),
        ("...", None, False),
    ],
)
def test_a_number_is_right_if_it_is_equal_however_it_is_written(written, read, right):
    form = AnswerFormat(kind="number", units=("$",))
    assert answer(form, written) == read and form.is_right(read, ["42.00"]) is right
    assert form.is_right(read, ["$42"]) is right  # the data may have units, too


def test_no_answer_is_right_where_none_is_known():
    for form, right in OPEN:
        assert not form.is_right(right, []) and not form.is_right(right, [""]) and not form.is_right(None, [right])
    assert not NONE.is_right("Paris", ["Paris"])


ILL_FORMED = [*by_the_tags(), *by_the_spelling()]


@pytest.mark.parametrize(("form", "right"), OPEN)
def test_a_completion_that_breaks_the_contract_has_no_answer_of_any_kind(form, right):
    good = AnswerFormat().write("It fell by half.", "yes")
    assert form.parse(good.replace(">yes<", f">{right}<")).answer == right
    for why, completion in ILL_FORMED:
        # Anywhere but in the tags "yes" is prose; there it would be an answer.
        assert form.parse(completion.replace("yes", right)).answer is None, why
    assert form.parse(form.write("...", right)).answer is None


@pytest.mark.parametrize("form", [NUMBER, TEXT, NONE])
def test_a_very_long_answer_is_read_in_linear_time(form):
    for part in ("9", "1,", "a.", "-", " ", ".5", "'", "\u0301", "<", "%"):
        found = answer(form, part * (400_000 // len(part)))
        assert form is not NUMBER or found is None


@settings(deadline=None)  # the cores are shared
@given(st.sampled_from([NUMBER, TEXT]), st.text(st.characters(), max_size=12))
def test_an_answer_that_was_read_is_read_again_and_equals_itself(form, text):
    found = form.read(text)
    if found is not None and "<" not in found:
        assert answer(form, found) == found and form.is_right(found, [text]) and form.is_right(found, [found])


def test_the_rule_that_an_answer_breaks_is_named():
    assert broken_rule("<reasoning>a</reasoning><answer>many</answer>", NUMBER) == "an answer that is not a number"
    assert broken_rule("<reasoning>a</reasoning><answer>...</answer>", TEXT) == "an answer that is not a text"


def test_sampling_stops_behind_an_answer_unless_none_is_asked_for():
    assert [form.stop for form in (NUMBER, TEXT, NONE)] == ["</answer>", "</answer>", ""]


# --- rewards and grades -------------------------------------------------------------------------------------------

NUMBERS = [Question("1", "6 x 7?", "", "42"), Question("2", "1 / 2?", "", "0.5"), Question("3", "2 x 2?", "", "4")]
TEXTS = [
    Question("1", "Which city?", "", "UK", accepted=("UK", "United Kingdom")),
    Question("2", "Which planet?", "", "Mars", accepted=("Mars",)),
]


def texts_of(form, *answers):
    return [form.write("It is.", answer) for answer in answers]


@pytest.mark.parametrize(
    ("form", "questions", "answers", "expected"),
    [
        (NUMBER, NUMBERS, ["42.0", "1/2", "5"], [2.0, 2.0, 0.0]),
        (TEXT, TEXTS, ["united kingdom.", "Venus"], [2.0, 0.0]),
    ],
)
def test_correctness_pays_for_an_equal_number_and_for_any_accepted_text(form, questions, answers, expected):
    functions = {"correctness": (ready_made(answer_format=form)["correctness"], 1.0)}
    assert score(texts_of(form, *answers), questions, functions=functions).total == expected


def test_functions_get_the_accepted_texts_beside_the_label_and_nothing_new_for_other_answers():
    columns = columns_of(["a", "b"], TEXTS)
    assert columns["label"] == ["UK", "Mars"] and columns["accepted"] == [("UK", "United Kingdom"), ("Mars",)]
    assert columns_for_rewards(TEXTS) == ["accepted"] and columns_for_rewards(NUMBERS) == []
    assert "accepted" not in columns_of(["a"] * 3, NUMBERS)


def test_numbers_have_accuracy_interval_and_form_and_no_classes():
    found = graded([*texts_of(NUMBER, "42", "3"), "4"], NUMBERS, NUMBER)
    assert found.answers == ["42", "3", None] and found.right == [True, False, False]
    assert (found.grades.accuracy, found.grades.well_formed, found.quality) == (1 / 3, 2 / 3, 1 / 3)
    assert not isinstance(found.grades, ClassGrades)
    assert [*found.figures()] == ["count", "accuracy", "accuracy_interval", "well_formed"]
    assert evaluation_metrics(found) == {"eval/accuracy": 1 / 3, "eval/well_formed": 2 / 3}


def test_votes_for_a_text_are_counted_in_any_spelling():
    sampled = [["uk", "France", "UK."], ["Venus", "Mars", "venus!"]]
    assert count_votes(sampled, TEXTS, TEXT).vote_accuracy == 0.5  # UK right, Venus wrong


def test_where_no_answer_is_right_the_mean_of_each_reward_is_the_grade():
    questions = [Question("1", "Write.", "", ""), Question("2", "Sing.", "", "")]
    found = graded(["La la.", "Well."], questions, NONE)
    assert (found.grades, found.right, found.quality) == (None, None, None)
    found = found.rewarded(Rewards([1.5, 0.0], {"short": [1.0, 0.0], "cites": [0.5, None], "odd": [None, None]}))
    assert found.quality == 0.75 and found.earned.mean_rewards == {"short": 0.5, "cites": 0.5, "odd": None}
    names = {"eval/reward": 0.75, "eval/rewards/short/mean": 0.5, "eval/rewards/cites/mean": 0.5}
    assert evaluation_metrics(found) == names
    low, high = found.figures()["mean_reward_interval"]
    assert low <= 0.75 <= high
    assert found.of([1], questions, NONE).earned.mean_reward == 0.0


def test_one_completion_has_a_mean_reward_too():
    assert earned(Rewards([2.0], {"a": [2.0]})).mean_reward_interval == (2.0, 2.0)


def test_a_lax_parser_of_numbers_takes_the_last_one_and_of_texts_any_accepted_one():
    assert [last_number(text) for text in ("It is 41, no: 42.", "**$1,250.50**", "none", "4-2")] == [
        "42", "1250.5", None, "2",
    ]  # fmt: skip
    assert accepted_anywhere("It is the United-Kingdom!", TEXTS[0].accepted) == "United Kingdom"
    assert accepted_anywhere("Ukraine", TEXTS[0].accepted) is None
    lax = lax_grades(["It is 42", "0.5", "5"], [""] * 3, NUMBERS, NUMBER)
    assert {name: grades.accuracy for name, grades in lax.items()} == {"last_number": 2 / 3}
    lax = lax_grades(["I think it is Mars", "Mars, I think"], [""] * 2, TEXTS, TEXT)
    assert {name: grades.accuracy for name, grades in lax.items()} == {"accepted_anywhere": 0.5}


def test_a_lax_parser_reads_a_long_text_in_linear_time():
    for part in ("9", "1,", "-", ".1"):
        last_number(part * (400_000 // len(part)))


def test_grades_of_labels_are_those_of_before():
    questions = [Question("1", "Is it?", "", "yes"), Question("2", "Was it?", "", "no")]
    grades = grade_answers(["yes", "yes"], questions, AnswerFormat())
    assert (grades.accuracy, grades.recall, grades.majority_baseline) == (0.5, {"yes": 1.0, "no": 0.0}, 0.5)


def test_the_records_of_the_data_may_have_units_too(tmp_path):
    (tmp_path / "sums.json").write_text(json.dumps([{"question": "What is it?", "ground_truth": "$1,250.50"}]))
    how = {"fields": {"context": "none"}, "answers": "number"}
    assert read_questions(str(tmp_path / "sums.json"), units=("$",), **how).questions[0].label == "1250.5"
    with pytest.raises(DataError, match="which is not a number"):
        read_questions(str(tmp_path / "sums.json"), **how)
