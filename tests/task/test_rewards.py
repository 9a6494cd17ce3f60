"""Rewards: what each completion earns, and from which function."""

import pytest

from grpo_ds.errors import UsageError
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import reward_functions, score

LABELS = ("yes", "no")
YES_QUESTION = Question(id="1", text="Is it?", context="It is.", label="yes")

EARNINGS = [  # completion, correctness, format
    ("<reasoning>a</reasoning><answer>yes</answer>", 2.0, 0.4),
    ("<reasoning>a</reasoning><answer>no</answer>", 0.0, 0.4),  # well-formed and wrong
    ("<answer>yes</answer>", 0.0, 0.2),  # a right answer without reasoning is no parse
    ("<reasoning>a</reasoning>", 0.0, 0.2),
    ("<reasoning>a</reasoning><answer>yes</answer><answer>no</answer>", 0.0, 0.0),  # hedging earns nothing
    ("<reasoning><answer>yes</answer></reasoning>", 0.0, 0.0),
    ("yes", 0.0, 0.0),
]


@pytest.mark.parametrize(("completion", "correctness", "format_"), EARNINGS)
def test_a_completion_earns_by_answer_and_by_form(completion, correctness, format_):
    rewards = score([completion], [YES_QUESTION], functions=reward_functions(labels=LABELS))
    assert rewards.by_name == {"correctness": [correctness], "format": [format_]}
    assert rewards.total == [correctness + format_]


def test_each_completion_is_compared_with_its_own_question():
    no_question = Question(id="2", text="Is it?", context="It is not.", label="no")
    completions = ["<reasoning>a</reasoning><answer>no</answer>"] * 2
    rewards = score(completions, [YES_QUESTION, no_question], functions=reward_functions(labels=LABELS))
    assert rewards.by_name["correctness"] == [0.0, 2.0]


def test_weights_are_what_was_asked_for():
    functions = reward_functions(labels=LABELS, correctness_reward=1.0, format_reward=0.5)
    assert score([EARNINGS[0][0]], [YES_QUESTION], functions=functions).by_name == {
        "correctness": [1.0],
        "format": [1.0],
    }


def test_a_function_of_ones_own_joins_by_name_and_weight():
    def brevity(completions, **_):
        return [-len(completion) for completion in completions]

    rewards = score(["abc", "a"], [YES_QUESTION] * 2, functions={"brevity": (brevity, 0.1), "again": (brevity, 1.0)})
    assert rewards.by_name["brevity"] == pytest.approx([-0.3, -0.1])
    assert rewards.total == pytest.approx([-3.3, -1.1])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'mine' returned 1 values for 2 completions"),
        ([1.0, None], "'mine' returned None for completion 1: 'second'"),
        ([float("nan"), 1.0], "'mine' returned nan for completion 0: 'first'"),
        (["1", 1.0], "'mine' returned '1' for completion 0"),
    ],
)
def test_a_function_that_does_not_return_a_number_each_is_named(returned, message):
    functions = {"mine": (lambda **_: returned, 1.0)}
    with pytest.raises(UsageError, match="must return") as error:
        score(["first", "second"], [YES_QUESTION] * 2, functions=functions)
    assert message in str(error.value)


def test_a_reward_that_no_text_decides_is_added_and_reported():
    rewards = score(["yes", "no"], [YES_QUESTION] * 2, functions=reward_functions(labels=LABELS))
    more = rewards.plus("overlong", [-0.5, 0.0])
    assert more.total == [-0.5, 0.0]
    assert more.by_name == {**rewards.by_name, "overlong": [-0.5, 0.0]}
