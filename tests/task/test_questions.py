"""Questions: the split, the order in which they are asked, and real data."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.errors import DataError, UsageError
from grpo_ds.task.questions import (
    Question,
    fingerprint,
    first_in_proportion,
    questions_at,
    read_questions,
    split_questions,
)
from tests.conftest import SHARED_DATA

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the PubMedQA files are not on this machine")


def make_questions(**counts):
    return [Question(f"{label}{i}", f"{label} {i}?", "c", label) for label, n in counts.items() for i in range(n)]


def ids(questions):
    return [question.id for question in questions]


# The split.


@pytest.mark.parametrize("yes", [0, 1, 190, 250, 276, 333, 499])
def test_500_records_of_any_mix_give_400_and_100(yes):
    train, held_out = split_questions(make_questions(yes=yes, no=500 - yes), eval_fraction=0.2, seed=0)
    assert (len(train), len(held_out)) == (400, 100)


def test_each_class_gives_its_share_to_the_held_out_part():
    _, held_out = split_questions(make_questions(yes=62, no=38), eval_fraction=0.5, seed=0)
    assert [question.label for question in held_out].count("yes") == 31


def test_a_place_left_by_rounding_goes_to_the_largest_remainder():
    # 0.2 of 7, 7 and 11 is 1.4, 1.4 and 2.2. Of 25 records 5 are held out: 1 + 1 + 2, and one more of the first 1.4.
    _, held_out = split_questions(make_questions(yes=7, no=7, maybe=11), eval_fraction=0.2, seed=0)
    labels = [question.label for question in held_out]
    assert {label: labels.count(label) for label in ("no", "yes", "maybe")} == {"no": 2, "yes": 1, "maybe": 2}


@settings(deadline=None)  # the cores are shared
@given(
    st.integers(0, 40), st.integers(0, 40), st.floats(0.01, 0.99), st.integers(0, 5), st.randoms(use_true_random=False)
)
def test_the_parts_are_disjoint_complete_stratified_and_independent_of_order(yes, no, eval_fraction, seed, rng):
    questions = make_questions(yes=yes, no=no)
    try:
        train, held_out = split_questions(questions, eval_fraction=eval_fraction, seed=seed)
    except DataError:
        return
    assert sorted(ids(train) + ids(held_out)) == sorted(ids(questions))
    assert train and held_out and abs(len(held_out) - len(questions) * eval_fraction) <= 0.5 + 1e-9
    assert abs(sum(q.label == "yes" for q in held_out) - yes * eval_fraction) < 1
    shuffled = rng.sample(questions, len(questions))
    assert split_questions(shuffled, eval_fraction=eval_fraction, seed=seed) == (train, held_out)


def test_another_seed_holds_out_other_questions():
    questions = make_questions(yes=50, no=50)
    held_out = [set(ids(split_questions(questions, eval_fraction=0.2, seed=seed)[1])) for seed in (0, 1)]
    assert held_out[0] != held_out[1]


def test_the_split_of_seed_0_never_changes():
    # Published numbers depend on it: if this fails, old and new evaluations grade different questions.
    _, held_out = split_questions(make_questions(yes=10, no=10), eval_fraction=0.2, seed=0)
    assert ids(held_out) == ["no0", "yes1", "yes5", "no2"]


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ({"yes": 50, "no": 50}, 2, {"yes": 1, "no": 1}),
        ({"yes": 62, "no": 38}, 1, {"yes": 1}),
        ({"yes": 62, "no": 38}, 2, {"yes": 1, "no": 1}),  # 1.24 and 0.76
        ({"yes": 62, "no": 38}, 3, {"yes": 2, "no": 1}),  # 1.86 and 1.14
        ({"yes": 62, "no": 38}, 50, {"yes": 31, "no": 19}),
        ({"yes": 50, "no": 30, "maybe": 20}, 3, {"yes": 1, "no": 1, "maybe": 1}),  # 1.5, 0.9 and 0.6
        ({"yes": 90, "no": 10}, 2, {"yes": 2}),  # 1.8 and 0.2: two places cannot hold the proportion
        ({"yes": 3, "no": 2}, 9, {"yes": 3, "no": 2}),
        ({"yes": 3, "no": 2}, None, {"yes": 3, "no": 2}),
    ],
)
def test_a_limit_keeps_the_classes_in_proportion(counts, limit, expected):
    questions = make_questions(**counts)
    chosen = first_in_proportion(questions, limit)
    assert Counter(question.label for question in chosen) == expected
    for label, places in expected.items():  # the first of each class, in the order given
        assert [q for q in chosen if q.label == label] == [q for q in questions if q.label == label][:places]
    assert chosen == [question for question in questions if question in chosen]


@settings(deadline=None)  # the cores are shared
@given(st.lists(st.sampled_from(["yes", "no", "maybe"]), min_size=1, max_size=60), st.integers(1, 60))
def test_any_limit_is_used_up_and_no_class_is_a_question_off_its_share(labels, limit):
    questions = [Question(str(n), f"{n}?", "c", label) for n, label in enumerate(labels)]
    chosen = first_in_proportion(questions, limit)
    assert len(chosen) == min(limit, len(questions))
    for label, count in Counter(labels).items():
        assert abs(sum(q.label == label for q in chosen) - count * len(chosen) / len(labels)) < 1


SAME = Question("1", "Does it help? Caf\u00e9", "It did.", "yes")


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Question("2", "Does it help? Caf\u00e9", "It did.", "no"), True),  # another id and another answer
        (Question("1", "does  it\nhelp? CAF\u00c9", "It  did. ", "yes"), True),  # case and spacing
        (Question("1", "Does it help? Cafe\u0301", "It did.", "yes"), True),  # another Unicode form
        (Question("1", "Does it help? Cafe", "It did.", "yes"), False),
        (Question("1", "Does it help? Caf\u00e9", "It did not.", "yes"), False),  # another study
        (Question("1", "Does it help? Caf\u00e9 It", "did.", "yes"), False),
    ],
)
def test_a_fingerprint_is_that_of_question_and_context(other, same):
    assert (fingerprint(other) == fingerprint(SAME)) is same


def test_a_fingerprint_takes_time_linear_in_the_text():
    marks = "\u0323\u0301" * 200_000  # out of order: normalising them takes minutes
    assert len(fingerprint(Question("1", f"Is it a{marks}?", "", "yes"))) == 12


@settings(deadline=None)  # the cores are shared
@given(st.integers(1, 30), st.integers(1, 30), st.sets(st.integers(0, 29)), st.floats(0.05, 0.95), st.integers(0, 5))
def test_what_was_trained_on_is_never_held_out(yes, no, known, eval_fraction, seed):
    questions = make_questions(yes=yes, no=no)
    trained_on = {fingerprint(questions[n]) for n in known if n < len(questions)}
    try:
        _, held_out = split_questions(questions, eval_fraction=eval_fraction, seed=seed)
    except DataError:
        return
    more, fewer = split_questions(questions, eval_fraction=eval_fraction, seed=seed, trained_on=trained_on)
    assert sorted(ids(more) + ids(fewer)) == sorted(ids(questions))
    assert not trained_on & {fingerprint(question) for question in fewer}
    for label in ("yes", "no"):
        fresh = [q for q in questions if q.label == label and fingerprint(q) not in trained_on]
        wanted = sum(q.label == label for q in held_out)
        assert sum(q.label == label for q in fewer) == min(wanted, len(fresh))


@pytest.mark.parametrize(("eval_fraction", "fewest"), [(0.2, 3), (0.5, 2), (0.01, 50), (0.9, 6), (0.34, 2)])
def test_the_error_for_too_few_records_names_the_number_needed(eval_fraction, fewest):
    split_questions(make_questions(yes=fewest), eval_fraction=eval_fraction, seed=0)
    with pytest.raises(DataError, match=f"at least {fewest} records"):
        split_questions(make_questions(yes=fewest - 1), eval_fraction=eval_fraction, seed=0)


@pytest.mark.parametrize("eval_fraction", [0.0, 1.0, -0.2, 20, float("nan")])
def test_a_fraction_is_between_0_and_1(eval_fraction):
    with pytest.raises(UsageError, match=r"Try --eval_fraction 0\.2"):
        split_questions(make_questions(yes=10), eval_fraction=eval_fraction, seed=0)


# The order.


@settings(deadline=None)  # the cores are shared
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 9))
def test_every_epoch_asks_each_question_once_wherever_its_steps_start(count, per_step, seed):
    questions = make_questions(yes=count)
    steps = -(-3 * count // per_step)  # enough for three epochs
    asked = [q.id for step in range(steps) for q in questions_at(step, questions, per_step=per_step, seed=seed)]
    for epoch in range(3):
        assert sorted(asked[epoch * count : (epoch + 1) * count]) == sorted(ids(questions))


def test_a_step_is_a_function_of_step_and_seed_alone():
    questions = make_questions(yes=20)
    forward = [ids(questions_at(step, questions, per_step=3, seed=1)) for step in range(30)]
    order = random.Random(0).sample(range(30), 30)
    assert all(ids(questions_at(step, questions, per_step=3, seed=1)) == forward[step] for step in order)


def test_epochs_and_seeds_differ_in_their_order():
    questions = make_questions(yes=20)
    first, second = (ids(questions_at(step, questions, per_step=20, seed=0)) for step in (0, 1))
    other_seed = ids(questions_at(0, questions, per_step=20, seed=1))
    assert first != second and first != other_seed and first != ids(questions)


@settings(deadline=None)  # the cores are shared
@given(
    st.dictionaries(st.sampled_from(["yes", "no", "maybe"]), st.integers(1, 12), min_size=1),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_balanced_steps_alternate_between_classes_and_leave_no_question_out(counts, per_step, seed):
    questions = make_questions(**counts)
    largest = max(counts.values())
    steps = -(-largest * len(counts) // per_step)  # enough for an epoch of the largest class
    asked = [questions_at(step, questions, per_step=per_step, seed=seed, balanced=True) for step in range(steps)]
    for step in asked:
        by_label = [sum(q.label == label for q in step) for label in counts]
        assert max(by_label) - min(by_label) <= 1
    in_order = [question for step in asked for question in step]
    for label, count in counts.items():
        turns = [q.id for q in in_order if q.label == label]
        for first in range(0, len(turns) - count + 1, count):
            assert len(set(turns[first : first + count])) == count  # no question twice before all were asked
    assert {q.id for q in in_order} == set(ids(questions))


def test_a_balanced_step_is_a_function_of_step_and_seed_alone():
    questions = make_questions(yes=20, no=7)
    forward = [ids(questions_at(step, questions, per_step=3, seed=1, balanced=True)) for step in range(30)]
    order = random.Random(0).sample(range(30), 30)
    assert all(ids(questions_at(s, questions, per_step=3, seed=1, balanced=True)) == forward[s] for s in order)


# Real data.


@needs_shared_data
def test_our_form_and_pubmedqas_own_give_the_same_questions():
    ours = read_questions(str(SHARED_DATA / "pubmedqa_labeled_yesno.json"))
    original = read_questions(str(SHARED_DATA / "ori_pqal_first60.json"))
    assert (len(ours.questions), ours.left_out) == (445, {})
    assert (len(original.questions), original.left_out) == (50, {"maybe": 10})
    assert set(original.questions) <= set(ours.questions)
    assert original.source.endswith("ori_pqal_first60.json: 50 questions (36 yes, 14 no, 10 maybe left out)")


@needs_shared_data
def test_maybe_is_kept_when_it_is_a_label():
    read = read_questions(str(SHARED_DATA / "ori_pqal_first60.json"), labels=("yes", "no", "maybe"))
    assert (len(read.questions), read.left_out) == (60, {})


@needs_shared_data
def test_a_file_and_its_lines_hold_the_same_questions(tmp_path):
    records = json.loads((SHARED_DATA / "pubmedqa_labeled_yesno.json").read_text())
    lines = tmp_path / "lines.json"  # the name is wrong: the content decides
    lines.write_text("\n".join(json.dumps(record) for record in records))
    assert (
        read_questions(str(lines)).questions
        == read_questions(str(SHARED_DATA / "pubmedqa_labeled_yesno.json")).questions
    )


def test_the_worked_examples_are_not_in_the_data():
    from grpo_ds.task.worked_examples import IN_BIOMEDICINE

    texts = {question.text for question in read_questions("sample").questions}
    assert texts.isdisjoint(example.text for example, _ in IN_BIOMEDICINE)
