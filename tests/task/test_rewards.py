"""Rewards: the value of each function for each completion, and functions that fail."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import time
from numbers import Real

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.errors import MAX_LINES, RewardError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import ARGUMENTS, READY_MADE, length_penalty, ready_made, repetition_penalty
from grpo_ds.task.scoring import LARGEST_REWARD, Rewards, joined, score

FORMAT = AnswerFormat(("yes", "no"))
YES_QUESTION = Question(id="1", text="Is it?", context="It is.", label="yes", columns={"year": 1999})
NO_QUESTION = Question(id="2", text="Is it?", context="It is not.", label="no", columns={"year": None})


def default_functions(**options):
    functions = ready_made(answer_format=FORMAT, **options)
    return {name: (functions[name], 1.0) for name in ("correctness", "format")}


EARNINGS = [  # completion, correctness, format
    ("<reasoning>a</reasoning><answer>yes</answer>", 2.0, 0.4),
    ("<reasoning>a</reasoning><answer>no</answer>", 0.0, 0.4),  # well-formed and wrong
    ("<answer>yes</answer>", 0.0, 0.2),  # a right answer without reasoning does not parse
    ("<reasoning>a</reasoning>", 0.0, 0.2),
    ("<reasoning>a</reasoning><answer>yes</answer><answer>no</answer>", 0.0, 0.0),  # two answers earn nothing
    ("<reasoning><answer>yes</answer></reasoning>", 0.0, 0.0),
    ("yes", 0.0, 0.0),
]


@pytest.mark.parametrize(("completion", "correctness", "format_"), EARNINGS)
def test_a_completion_earns_by_answer_and_by_form(completion, correctness, format_):
    rewards = score([completion], [YES_QUESTION], functions=default_functions())
    assert rewards.by_name == {"correctness": [correctness], "format": [format_]}
    assert rewards.total == [correctness + format_]


def test_each_completion_is_compared_with_its_own_question():
    completions = ["<reasoning>a</reasoning><answer>no</answer>"] * 2
    rewards = score(completions, [YES_QUESTION, NO_QUESTION], functions=default_functions())
    assert rewards.by_name["correctness"] == [0.0, 2.0]


def test_the_two_rewards_are_settings_and_weights_multiply_them():
    functions = default_functions(correctness_reward=1.0, format_reward=0.5)
    functions["format"] = functions["format"][0], 3.0
    assert score([EARNINGS[0][0]], [YES_QUESTION], functions=functions).by_name == {
        "correctness": [1.0],
        "format": [3.0],
    }


REPETITIONS = [
    ("", 0.0),
    ("no no", 0.0),  # below three words there is nothing to repeat
    ("a b c", 0.0),
    ("a b c d e", 0.0),
    ("a b c a b c", -1 / 4),  # abc bca cab abc: one of four is repeated
    ("A b c a B C", -1 / 4),  # case is ignored
    ("no " * 101, -98 / 99),
]


@pytest.mark.parametrize(("completion", "penalty"), REPETITIONS)
def test_repeated_3_grams_cost_their_share(completion, penalty):
    assert repetition_penalty([completion]) == [pytest.approx(penalty)]


@pytest.mark.parametrize(
    ("reasoning", "penalty"),
    [("Yes", -1), ("yes.", -1), ("No, yes!", -1), ("", -1), ("Yes, it fell", 0), ("no one", 0), ("yesterday", 0)],
)
def test_a_reasoning_of_labels_alone_is_penalised(reasoning, penalty):
    bare_label = ready_made(answer_format=FORMAT)["bare_label"]
    assert str(bare_label(completions=[FORMAT.write(reasoning, "yes")])) == f"[{penalty:.1f}]"  # not -0.0


@pytest.mark.peer("trl")
@settings(deadline=None)  # the cores are shared
@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_the_repetition_penalty_is_that_of_trl_on_words(words):
    from trl.rewards import get_repetition_penalty_reward

    theirs = get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)(completion_ids=[words])
    assert repetition_penalty([" ".join(words)]) == pytest.approx(theirs)


@pytest.mark.parametrize(("characters", "penalty"), [(0, 0.0), (10, -0.25), (40, -1.0), (41, -1.0)])
def test_every_character_costs_the_same_up_to_the_full_length(characters, penalty):
    assert length_penalty(["x" * characters], full_length=40) == [penalty]


def test_penalties_are_fast_on_long_texts():
    # Quadratic work on 400,000 words would not end within the time limit.
    functions = ready_made(answer_format=FORMAT)
    chosen = {name: (functions[name], 1.0) for name in READY_MADE}
    rewards = score(["<reasoning> a b c " * 100_000], [YES_QUESTION], functions=chosen, timeout=60)
    assert rewards.by_name["length_penalty"] == [-1.0] and rewards.by_name["repetition_penalty"][0] < -0.99


def test_a_users_function_adds_its_weighted_reward_under_its_name():
    def brevity(completions, **_):
        return [-len(completion) for completion in completions]

    rewards = score(["abc", "a"], [YES_QUESTION] * 2, functions={"brevity": (brevity, 0.1), "again": (brevity, 1.0)})
    assert rewards.by_name["brevity"] == pytest.approx([-0.3, -0.1])
    assert rewards.total == pytest.approx([-3.3, -1.1])


def test_a_function_gets_the_completions_and_every_column_of_their_records():
    seen = {}

    def look(**columns):
        seen.update(columns)
        return [0.0, 0.0]

    shadowing = Question("9", "Q?", "C.", "no", columns={"year": 5, "label": "another", "completions": "mine"})
    score(["first", "second"], [YES_QUESTION, shadowing], functions={"look": (look, 1.0)})
    assert {name: value for name, value in seen.items() if name not in ARGUMENTS or name == "completions"} == {
        "completions": ["first", "second"],
        "id": ["1", "9"],
        "question": ["Is it?", "Q?"],
        "context": ["It is.", "C."],
        "label": ["yes", "no"],  # ours, although a record has a field of the same name
        "year": [1999, 5],
    }


def test_none_does_not_count():
    functions = {"some": (lambda **_: [None, 1], 3.0), "other": (lambda **_: (0.5, 0.5), 1.0)}
    rewards = score(["a", "b"], [YES_QUESTION] * 2, functions=functions)
    assert rewards.by_name["some"] == [None, 3.0] and rewards.total == [0.5, 3.5] and not rewards.errors


def test_a_function_that_changes_its_lists_does_not_affect_the_next():
    def destructive(completions, **_):
        return [float(len(completions.pop())) for _ in range(2)]

    rewards = score(["a", "bb"], [YES_QUESTION] * 2, functions={n: (destructive, 1.0) for n in ("one", "two")})
    assert rewards.by_name["one"] == rewards.by_name["two"] == [2.0, 1.0]


def test_a_function_that_changes_a_record_does_not_affect_later_calls():
    record = Question("1", "Q?", "", "yes", columns={"trials": [{"size": 5}]})
    functions = {"mine": (lambda trials, **_: [trials[0].pop().popitem()[1]], 1.0)}
    assert [score(["a"], [record], functions=functions).total for _ in range(2)] == [[5.0], [5.0]]


def test_a_record_as_deep_as_json_can_be_is_scored():
    deep = Question("1", "Q?", "", "yes", columns={"more": json.loads("[" * 900 + "]" * 900)})
    assert score(["a"], [deep], functions={"mine": (lambda more, **_: [len(more)], 1.0)}).total == [1.0]


def raises(completions, label, **_):
    if "no" in label:
        raise KeyError("message\nof two lines")
    return [0.0] * len(completions)


def generates(completions, **_):
    yield 1.0
    if len(completions) > 1:
        yield 1 / 0


def throw(error):
    raise error


class Unprintable(BaseException):
    """An error, and something like a number, of which nothing can be read."""

    def fail(self, *_):
        raise self

    __str__ = __repr__ = __float__ = __abs__ = fail


Real.register(Unprintable)


class Unshowable:
    def __repr__(self):
        raise ValueError


def too_few_for_record_2(completions, label, **_):
    return [0.0] * label.count("yes")


FAULTS = [
    (raises, ["raised KeyError: 'message\\nof two lines' (test_rewards.py, line", "Record 2, completion 'second'"]),
    (generates, ["raised ZeroDivisionError: division by zero (test_rewards.py, line", "yield 1 / 0)", "records 1, 2"]),
    (lambda **_: exit(3), ["raised SystemExit: 3"]),
    (lambda **_: throw(asyncio.CancelledError()), ["raised CancelledError (test_rewards.py, line"]),
    (lambda **_: throw(GeneratorExit()), ["raised GeneratorExit (test_rewards.py, line"]),
    (lambda **_: throw(StopIteration("over")), ["raised StopIteration: over"]),
    (lambda **_: throw(Unprintable()), ["raised Unprintable (test_rewards.py, line"]),
    (lambda **_: [Unprintable(), 1.0], ["raised Unprintable (test_rewards.py, line"]),  # its __float__ raises
    (lambda completions, **_: int("x"), ["raised ValueError: invalid literal", "for any completion", "alone: 'first'"]),
    (too_few_for_record_2, ["returned 1 values for 2 completions", "Record 2, completion 'second'"]),
    (lambda **_: None, ["returned None, not a list"]),
    (lambda **_: 1.0, ["returned 1.0, not a list"]),
    (lambda **_: [1.0, float("nan")], ["returned nan; it must", "Record 2, completion 'second'"]),
    (lambda **_: [float("-inf"), 1.0], ["returned -inf", "Record 1, completion 'first'"]),
    (lambda **_: ["1", 1.0], ["returned '1'", "Record 1"]),
    (lambda **_: [10**400, 1.0], ["returned 1000", "Record 1"]),
    (lambda **_: [1.0, []], ["returned []", "Record 2"]),
    (lambda **_: {0: 1.0, 1: 0.0}, ["returned {0: 1.0, 1: 0.0}, not a list"]),  # its keys would pass as rewards
    (lambda **_: {1.0, 0.5}, ["not a list"]),  # a set has no order
    (lambda **_: b"no", ["returned b'no', not a list"]),  # Python iterates bytes as numbers
    (lambda **_: "10", ["returned '10', not a list"]),
    (lambda **_: itertools.count(), ["returned more than 2 values for 2 completions"]),  # endless
    (lambda **_: [10**5000, 1.0], ["returned a int; it must", "Record 1"]),  # without a repr
    (lambda **_: [Unshowable(), 1.0], ["returned a Unshowable; it must", "Record 1"]),
    (lambda **_: [1.0, 2j], ["returned 2j", "Record 2"]),
    (lambda **_: [0.0, -1e30], ["returned -1e+30 (-1e+30 after its weight); the limit is 1e+15", "Record 2"]),
]


@pytest.mark.parametrize(("function", "parts"), FAULTS)
def test_a_function_that_fails_is_named_with_record_and_line_in_six_lines(function, parts):
    with pytest.raises(RewardError) as error:
        score(["first", "second"], [YES_QUESTION, NO_QUESTION], functions={"mine": (function, 1.0)})
    message = str(error.value)
    assert message.startswith("The reward function 'mine' ") and "--on_reward_error zero" in message
    assert [part for part in parts if part not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES and error.value.exit_code == 7


@pytest.mark.parametrize("function", [function for function, _ in FAULTS])
def test_with_zero_its_rewards_are_left_out_and_the_others_count(function):
    functions = {"mine": (function, 1.0), **default_functions()}
    rewards = score(["yes", EARNINGS[0][0]], [NO_QUESTION, YES_QUESTION], functions=functions, on_error="zero")
    assert rewards.by_name["mine"] == [None, None] and rewards.total == [0.0, 2.4]
    assert list(rewards.errors) == ["mine"] and "'mine'" in rewards.errors["mine"]


def test_fields_of_a_record_do_not_replace_options_of_the_ready_made_functions():
    functions = ready_made(answer_format=FORMAT, correctness_reward=2.0)
    named_alike = Question("1", "Q?", "C.", "yes", columns={"reward": 9, "answer_format": "free", "full_length": 1})
    chosen = {name: (functions[name], 1.0) for name in READY_MADE}
    asked = {"completions": [EARNINGS[0][0]], "functions": chosen}
    assert score(questions=[named_alike], **asked) == score(questions=[YES_QUESTION], **asked)


RETURNED = st.none() | st.booleans() | st.floats() | st.integers() | st.fractions() | st.text(max_size=3) | st.binary()
RETURNED |= st.integers(10**300, 10**320) | st.lists(st.floats(), max_size=2)


@settings(deadline=None)  # the cores are shared
@given(
    st.one_of(st.lists(RETURNED | st.floats(-1, 1), max_size=4), RETURNED, st.dictionaries(st.floats(), st.floats())),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_returned_value_gives_finite_rewards_or_an_error_of_six_lines(returned, weight):
    questions = [YES_QUESTION, NO_QUESTION, YES_QUESTION]
    asked = {"completions": ["a", "b", "c"], "questions": questions}
    functions = {"mine": (lambda **_: returned, weight)}
    left_out = score(**asked, functions=functions, on_error="zero")
    try:
        rewards = score(**asked, functions=functions)
    except RewardError as error:
        assert len(str(error).splitlines()) <= MAX_LINES and "'mine'" in str(error)
        assert left_out.total == [0.0] * 3 and list(left_out.errors) == ["mine"]
    else:
        assert rewards == left_out and not rewards.errors
        assert rewards.total == [weight * float(value or 0) for value in returned]
        assert all(abs(reward) <= LARGEST_REWARD for reward in rewards.total)


def sleeps(**_):
    time.sleep(60)


def computes(**_):
    while True:
        with contextlib.suppress(Exception):  # it must not catch the time limit
            sum(range(1000))


def backtracks(**_):
    re.match("(a+)+$", "a" * 60 + "b")  # C code that handles signals


@pytest.mark.parametrize("function", [sleeps, computes, backtracks])
def test_a_call_ends_at_its_limit(function):
    with pytest.raises(RewardError, match=r"(?s)'slow' took longer than the 0.05 seconds.*records 1, 2"):
        score(["a", "b"], [YES_QUESTION, NO_QUESTION], functions={"slow": (function, 1.0)}, timeout=0.05)


def test_a_process_that_a_function_starts_has_no_limit_also_when_it_is_stopped_and_continues():
    def has_alarm(**_):
        if not (pid := os.fork()):
            os.kill(os.getpid(), signal.SIGCONT)
            os._exit(signal.getitimer(signal.ITIMER_REAL)[0] > 0)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

    assert score(["a"], [YES_QUESTION], functions={"it": (has_alarm, 1.0)}, timeout=60).total == [0.0]


@pytest.mark.parametrize("alarm", [0, 3600])
def test_after_a_call_the_previous_alarm_is_restored(alarm):
    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, alarm)
    try:
        score(["a"], [YES_QUESTION], functions=default_functions(), timeout=60)
        assert (signal.getitimer(signal.ITIMER_REAL)[0] > 60) == bool(alarm)
        assert signal.getsignal(signal.SIGALRM) == handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_reward_that_does_not_depend_on_the_text_is_added_and_reported():
    rewards = score(["yes", "no"], [YES_QUESTION] * 2, functions=default_functions())
    more = rewards.plus("overlong", [-0.5, 0.0])
    assert more.total == [-0.5, 0.0]
    assert more.by_name == {**rewards.by_name, "overlong": [-0.5, 0.0]}


def test_completions_scored_in_parts_get_the_rewards_of_one_call():
    parts = [
        Rewards([1.0, 0.5], {"a": [1.0, 0.5], "b": [None, None]}, {"b": "first"}),
        Rewards([2.0], {"a": [1.0], "b": [1.0]}, {}),
        Rewards([0.0], {"a": [0.0], "b": [None]}, {"b": "second"}),
    ]
    assert joined(parts) == Rewards(
        [1.0, 0.5, 2.0, 0.0], {"a": [1.0, 0.5, 1.0, 0.0], "b": [None, None, 1.0, None]}, {"b": "first"}
    )
