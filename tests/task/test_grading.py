"""Grading against scikit-learn and scipy, and against numbers worked out by hand."""

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.errors import DataError
from grpo_ds.task.grading import grade, mcnemar, small_sample
from grpo_ds.task.questions import Question
from grpo_ds.task.statistics import wilson_interval

LABELS = ("yes", "no")


def questions_with(labels):
    return [Question(id=str(i), text=f"q{i}", context="c", label=label) for i, label in enumerate(labels)]


def graded(answers, labels):
    return grade(answers, questions_with(labels), labels=LABELS)


def test_answering_yes_to_everything_is_no_better_than_the_majority_baseline():
    grades = graded(["yes"] * 100, ["yes"] * 62 + ["no"] * 38)
    assert grades.accuracy == grades.majority_baseline == 0.62
    assert grades.recall == {"yes": 1.0, "no": 0.0}
    # F1 of yes = 2 * 62 / (100 + 62) = 0.765, of no = 0; their mean:
    assert grades.macro_f1 == pytest.approx(0.3827, abs=1e-4)
    assert grades.collapsed


def test_an_answer_that_did_not_parse_is_wrong_and_counts_for_no_class():
    grades = graded(["yes", None, "no", None], ["yes", "yes", "no", "no"])
    assert (grades.accuracy, grades.well_formed, grades.predicted) == (0.5, 0.5, {"yes": 1, "no": 1})
    # each class: tp 1, fp 0, fn 1 -> 2 / 3
    assert grades.macro_f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answers", "labels", "collapsed"),
    [
        (["yes"] * 19 + ["no"], ["yes", "no"] * 10, True),  # 95 %
        (["yes"] * 18 + ["no"] * 2, ["yes", "no"] * 10, False),  # 90 %
        (["yes"] * 20, ["yes"] * 20, False),  # the labels are all yes as well
        (["no"] * 10 + [None] * 10, ["yes", "no"] * 10, True),  # 100 % of the parsed answers
        (["yes"] * 2 + [None] * 18, ["yes", "no"] * 10, False),  # two parsed answers are too few
        ([None] * 20, ["yes", "no"] * 10, False),
    ],
)
def test_collapsed_means_one_answer_to_everything(answers, labels, collapsed):
    assert graded(answers, labels).collapsed is collapsed


@settings(deadline=None)  # the cores are shared
@given(st.lists(st.tuples(st.sampled_from(["yes", "no", None]), st.sampled_from(["yes", "no"])), min_size=1))
def test_grades_equal_scikit_learns(pairs):
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    answers, labels = zip(*pairs, strict=True)
    predicted, present = [answer or "unparsed" for answer in answers], [x for x in LABELS if x in labels]
    grades = graded(answers, labels)
    assert grades.accuracy == pytest.approx(accuracy_score(labels, predicted))
    options = {"labels": present, "zero_division": 0.0}
    assert grades.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro", **options))
    assert list(grades.recall.values()) == pytest.approx(recall_score(labels, predicted, average=None, **options))


@pytest.mark.parametrize(("successes", "count"), [(0, 8), (5, 8), (8, 8), (62, 100), (1, 1)])
def test_the_interval_is_wilsons(successes, count):
    from scipy.stats import binomtest

    expected = binomtest(successes, count).proportion_ci(method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("count", range(1, 300))
def test_an_interval_ends_at_0_and_1_exactly(count):
    assert wilson_interval(0, count)[0] == 0.0  # and not 7e-18
    assert wilson_interval(count, count)[1] == 1.0
    assert wilson_interval(1, count + 1)[0] > 0.0 and wilson_interval(count, count + 1)[1] < 1.0


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "of 1 question says little"), (2, "95 % interval, 0% to 66%, is too wide"), (19, "of 19 questions"), (20, "")],
)
def test_fewer_than_20_questions_say_what_their_interval_is_worth(count, says):
    warning = small_sample(count, wilson_interval(0, count))
    assert says in warning and bool(warning) == bool(says)


@settings(deadline=None)  # the cores are shared
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_the_exact_binomial_test_of_the_changed_answers(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    n = gained + lost
    as_likely = [comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, gained)]
    assert mcnemar(before, after) == pytest.approx(sum(as_likely) / 2**n)


def test_mcnemar_by_hand():
    # 6 answers became right, none became wrong: 2 * (1/2)^6
    assert mcnemar([False] * 6 + [True], [True] * 7) == 0.03125
    assert mcnemar([True, False], [True, False]) == 1.0  # nothing changed


def test_no_questions_is_an_error_and_not_a_division_by_zero():
    with pytest.raises(DataError, match="no question to grade"):
        graded([], [])


def test_fewer_answers_than_questions_are_an_error():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        graded(["yes"], ["yes", "no"])
