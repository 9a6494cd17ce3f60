"""Label probabilities and their statistics, against scipy, enumeration, and numbers worked out by hand."""

import random
from itertools import product
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.task import answer_probs, grading, statistics
from grpo_ds.task.answer_probs import AnswerProbs, Confidence, compare_p_right, confidence, reasoning_gains
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import Evaluation, count_votes, graded
from grpo_ds.task.questions import Question
from grpo_ds.task.statistics import DRAWS, auc, bootstrap_interval, calibration_error, sign_flip_p, wilson_interval
from tests.conftest import check_example

LABELS = ("yes", "no", "maybe")
QUESTIONS = [Question(str(i), f"q{i}", "", label) for i, label in enumerate(["yes", "no", "no", "maybe"])]
PROBS = [
    AnswerProbs((0.7, 0.2, 0.1), (0.5, 0.3, 0.2)),  # yes
    AnswerProbs(None, (0.6, 0.3, 0.1)),  # no, out of form
    AnswerProbs((0.1, 0.9, 0.0), (0.2, 0.6, 0.2)),  # no
    AnswerProbs((0.5, 0.1, 0.4), (0.1, 0.0, 0.9)),  # maybe
]
DRAW = random.Random(7)
SKEWED = [DRAW.betavariate(1, 3) for _ in range(60)]


def test_figures_by_hand():
    found = confidence(PROBS, QUESTIONS, labels=LABELS)
    # p(right): 0.7, 0.3 (behind the empty reasoning), 0.9, 0.4
    assert found.mean_p_right == pytest.approx(2.3 / 4)
    assert found.mean_p_right_empty == pytest.approx((0.5 + 0.3 + 0.6 + 0.9) / 4)
    assert found.reasoned == 0.75
    assert found.reasoning_gain == pytest.approx((0.2 + 0.3 - 0.5) / 3)  # the second has none
    assert found.lean == pytest.approx({"yes": 1.9 / 4, "no": 1.5 / 4, "maybe": 0.6 / 4})
    assert found.class_shares == {"yes": 0.25, "no": 0.5, "maybe": 0.25}
    # Most likely: yes 0.7 right, yes 0.6 wrong, no 0.9 right, yes 0.5 wrong; each alone in its bin.
    assert found.calibration_error == pytest.approx((0.3 + 0.6 + 0.1 + 0.5) / 4)
    low, high = found.mean_p_right_interval
    assert 0.3 <= low < found.mean_p_right < high <= 0.9


def test_a_model_out_of_form_has_a_mean_and_no_gain():
    found = confidence([AnswerProbs(None, it.empty) for it in PROBS], QUESTIONS, labels=LABELS)
    assert found.mean_p_right == found.mean_p_right_empty and found.reasoned == 0
    assert found.reasoning_gain is None and found.reasoning_gain_interval is None
    assert reasoning_gains(PROBS, QUESTIONS, labels=LABELS)[1] is None


def test_learning_the_form_alone_changes_no_p_right():
    before, after = ([AnswerProbs(own, p) for own in (None, p)] for p in ((0.8, 0.2), (0.8, 0.2)))
    asked = QUESTIONS[:2]
    sides = [answer_probs.p_right(side, asked, labels=("yes", "no")) for side in (before, after)]
    assert compare_p_right(*sides) == {
        "p_right_change": 0.0, "p_right_change_interval": (0.0, 0.0), "p_right_p_value": 1.0
    }  # fmt: skip


@pytest.mark.parametrize("values", [SKEWED, [0.1, 0.2, 0.9], [0.5]], ids=["skewed", "three", "one"])
def test_the_interval_is_the_percentile_bootstraps(values):
    """Of three values there are only ten means, so an end falls on one of them; of many it may differ by a draw."""
    import numpy
    from scipy.stats import bootstrap

    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)  # the same draws
    if len(values) == 1:
        assert (low, high) == (0.5, 0.5)
        return
    generator = numpy.random.default_rng(1)
    theirs = bootstrap((values,), numpy.mean, method="percentile", n_resamples=20_000, rng=generator)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    expected = (theirs.confidence_interval.low, theirs.confidence_interval.high)
    assert (low, high) == pytest.approx(expected, abs=0.08 * width)


def test_the_interval_holds_the_true_mean_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 400)
    draw = random.Random(3)
    held = 0
    for _ in range(300):
        low, high = bootstrap_interval([draw.betavariate(2, 3) for _ in range(50)])  # its mean is 0.4
        held += low <= 0.4 <= high
    assert 0.90 <= held / 300 <= 0.98


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_the_test_of_few_differences_is_exact(differences):
    reached = abs(sum(differences))
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    expected = sum(abs(it) >= reached for it in sums) / len(sums)
    assert sign_flip_p([d / 9 for d in differences]) == pytest.approx(expected)


def test_the_test_of_many_differences_is_scipys():
    from scipy.stats import permutation_test

    draw = random.Random(5)
    for shift in (0.0, 0.04, 0.1):
        differences = [draw.gauss(shift, 0.3) for _ in range(89)]
        zeros = [0.0] * len(differences)
        theirs = permutation_test(
            (differences, zeros), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples",
            n_resamples=20_000, vectorized=True, rng=1,
        ).pvalue  # fmt: skip
        # Four deviations of a share of DRAWS draws; 2e-4 for a p-value near 0, which is never 0.
        tolerance = 4 * (theirs * (1 - theirs) / DRAWS) ** 0.5 + 1e-3
        assert sign_flip_p(differences) == pytest.approx(theirs, abs=tolerance)
        assert sign_flip_p(differences) > 0


def test_no_change_is_impossible_by_chance():
    assert sign_flip_p([0.1] * 89) == 1 / (DRAWS + 1)  # no random flip reaches it, but one of all flips does


def test_nothing_that_changes_is_no_sign_of_change():
    assert sign_flip_p([0.0] * 40) == sign_flip_p([0.0]) == 1.0


def test_a_change_of_probabilities_shows_where_answers_are_too_few():
    """Half of 89 right before and after; every p(right) rises by about 0.05."""
    draw = random.Random(2)
    before = [draw.uniform(0.1, 0.9) for _ in range(89)]
    after = [p + draw.gauss(0.05, 0.1) for p in before]
    answers = [[p > 0.5 for p in side] for side in (before, after)]
    assert grading.mcnemar(*answers) > 0.05 > 0.001 > compare_p_right(before, after)["p_right_p_value"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_the_calibration_error_is_the_weighted_gap_of_ten_bins(pairs):
    gap = 0.0
    for low in range(10):
        some = [pair for pair in pairs if low <= pair[0] * 10 < low + 1 or (low == 9 and pair[0] == 1)]
        if some:
            means = [sum(side) / len(some) for side in zip(*some, strict=True)]
            gap += len(some) / len(pairs) * abs(means[0] - means[1])
    assert calibration_error(*zip(*pairs, strict=True)) == pytest.approx(gap)


@settings(deadline=None, max_examples=50)
@given(*[st.lists(st.sampled_from([0.1, 0.4, 0.5, 0.9]), min_size=1, max_size=30)] * 2)
def test_the_auc_is_that_of_the_rank_sums(positive, negative):
    from scipy.stats import mannwhitneyu

    area, (low, high) = auc(positive, negative)
    assert area == pytest.approx(mannwhitneyu(positive, negative).statistic / len(positive) / len(negative))
    assert 0 <= low <= area <= high <= 1


def test_the_aucs_interval_covers_the_true_one():
    """Normal scores a standard deviation apart have an AUC of Phi(1 / sqrt(2)) = 0.760; 55 and 34 as held out here."""
    draw, true = random.Random(1), NormalDist().cdf(0.5**0.5)
    intervals = [auc(*([draw.gauss(at, 1) for _ in range(n)] for at, n in ((1, 55), (0, 34))))[1] for _ in range(300)]
    assert 0.91 <= sum(low <= true <= high for low, high in intervals) / 300 <= 0.98


def test_a_lean_leaves_the_auc_alone_and_two_labels_alone_have_one():
    asked, probs = QUESTIONS[:3], [AnswerProbs(None, (p, 1 - p)) for p in (0.99, 0.98, 0.97)]  # yes, no, no
    found = confidence(probs, asked, labels=("yes", "no"))
    assert found.auc == 1.0 and found.lean["yes"] > 0.97
    assert confidence(PROBS, QUESTIONS, labels=LABELS).auc is None
    assert confidence(probs[:1], asked[:1], labels=("yes", "no")).auc_interval is None


def test_of_equally_many_votes_the_first_drawn_counts_and_no_answer_has_none():
    sampled = [["no", "yes", "yes"], ["no", "yes", None], [None, None, None], ["yes", "maybe", "maybe"]]
    votes = count_votes(sampled, QUESTIONS, AnswerFormat(LABELS))  # yes right, no right, none, maybe right
    assert (votes.samples, votes.vote_accuracy) == (3, 0.75)
    assert votes.vote_accuracy_interval == wilson_interval(3, 4)


def test_an_evaluation_of_some_of_the_questions_is_theirs_alone():
    texts, form = ["<reasoning>a</reasoning><answer>no</answer>", "", "", ""], AnswerFormat(LABELS)
    sampled = [["yes"], ["yes"], ["no"], ["maybe"]]
    some = graded(texts, QUESTIONS, form, PROBS, sampled).of([3, 0], QUESTIONS, form)
    asked = [QUESTIONS[3], QUESTIONS[0]]
    assert some == graded([texts[3], texts[0]], asked, form, [PROBS[3], PROBS[0]], [sampled[3], sampled[0]])
    assert some.answers == [None, "no"] and some.figures()["mean_p_right"] == pytest.approx(0.55)
    assert some.figures()["vote_accuracy"] == 1.0


def test_figures_that_are_not_known_are_not_there():
    figures = graded([""], QUESTIONS[:1], AnswerFormat(LABELS)).figures()
    assert figures["accuracy"] == 0 and not {"mean_p_right", "vote_accuracy"} & figures.keys()


@pytest.mark.parametrize("of", [AnswerProbs, Confidence, Evaluation])
def test_examples(of):
    check_example(of)
