"""Before a model is loaded each of the user's reward functions is called once, on completions of every kind."""

import random
import time

import numpy
import pytest
import torch

from grpo_ds.errors import MAX_LINES, RewardError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.own_rewards import own_reward
from grpo_ds.task.questions import Question
from grpo_ds.task.reward_trial import KINDS, made_up, try_rewards
from grpo_ds.task.rewards import ready_made

FORM = AnswerFormat(("yes", "no"))
QUESTIONS = [Question(str(n), f"Is it {n}?", "", ("yes", "no")[n % 2], columns={"year": 2000 + n}) for n in range(5)]


def tried(function, *, questions=QUESTIONS, form=FORM, batch_size=2, group_size=4, **options):
    functions = {"mine": (own_reward(function, ["year"]), 0.5)}
    return try_rewards(
        functions, questions, answer_format=form, batch_size=batch_size, group_size=group_size,
        trainer_state=lambda: "a state", messages=lambda it: [{"role": "user", "content": it.text}], **options,
    )  # fmt: skip


def crashes_on_an_empty_text(completions, **_):
    return [1 / len(completion) for completion in completions]


def crashes_without_tags(completions, **_):
    return [float(len(completion.split("<answer>")[1])) for completion in completions if completion]


FAULTS = [  # function, words of the error
    (crashes_on_an_empty_text, ["'mine' raised ZeroDivisionError", "Record 0, completion ''", "line 3"]),
    (crashes_without_tags, ["'mine' raised IndexError", "Record 0, completion 'A made-up completion. It is yes.'"]),
    (lambda completions: [0.0], ["returned 1 values for 8 completions"]),
    (lambda completions: ["good"] * 8, ["returned 'good'; it must return finite numbers"]),
    (lambda completions: None, ["returned None, not a list"]),
    (lambda year, label: [year[0] / (label[4] == "yes")] * 8, ["ZeroDivisionError"]),  # by the second record
    (lambda completions: time.sleep(60), ["took longer than the 0.2 seconds of --reward_timeout"]),
]


@pytest.mark.parametrize(("function", "words"), FAULTS)
def test_a_mistake_is_found_with_its_completion_in_six_lines(function, words):
    with pytest.raises(RewardError) as error:
        tried(function, timeout=0.2)
    message = str(error.value)
    shown = [word for word in words if word not in message and word != "line 3"]
    assert shown == [] and "nothing was written" in message and len(message.splitlines()) <= MAX_LINES, message


def test_a_function_that_may_fail_is_a_warning():
    (said,) = tried(crashes_on_an_empty_text, on_error="zero")
    assert said.startswith("Warning: The reward function 'mine' raised ZeroDivisionError")
    assert tried(lambda completions: [0.0] * 8, on_error="zero") == []


@pytest.mark.parametrize(
    ("batch_size", "group_size", "count"), [(2, 4, 8), (1, 8, 8), (1, 2, 4), (3, 3, 9), (7, 4, 28)]
)
def test_a_call_has_the_groups_of_a_step_and_every_kind_of_completion(batch_size, group_size, count):
    seen = {}

    def looks(completions, id, year, prompts, completion_ids, trainer_state, **_):
        seen.update(texts=completions, ids=id, years=year, prompts=prompts, tokens=completion_ids, state=trainer_state)
        return [None] * len(completions)

    assert tried(looks, batch_size=batch_size, group_size=group_size) == []
    groups = [seen["ids"][start : start + group_size] for start in range(0, count, group_size)]
    assert len(seen["texts"]) == len(seen["prompts"]) == len(seen["tokens"]) == count
    assert (
        all(len(set(group)) == 1 for group in groups)
        and [group[0] for group in groups[:2]] == ["0", "1"][: len(groups)]
    )
    assert seen["years"] == [2000 + int(it) for it in seen["ids"]] and seen["state"] == "a state"
    answers = [FORM.parse(text).answer for text in seen["texts"][:KINDS]]
    assert None not in answers[:2] and answers[2:] == [None, None] and "" in seen["texts"]


def test_a_state_is_made_only_for_a_function_that_reads_it():
    made = lambda: pytest.fail("transformers would be imported")  # noqa: E731
    ignores = own_reward(lambda completions, **kwargs: [0.0] * 4, [])
    chat = lambda it: [{"role": "user", "content": it.text}]  # noqa: E731
    sizes = {"batch_size": 1, "group_size": 4, "answer_format": FORM}
    assert try_rewards({"it": (ignores, 1.0)}, QUESTIONS, trainer_state=made, messages=chat, **sizes) == []
    ours = {name: (function, 1.0) for name, function in ready_made(answer_format=FORM).items()}
    assert try_rewards(ours, QUESTIONS, trainer_state=made, messages=made, **sizes) == []


KINDS_OF_ANSWER = [
    (FORM, QUESTIONS[1]),
    (AnswerFormat(kind="number"), Question("1", "6 times 7?", "", "42")),
    (AnswerFormat(kind="text"), Question("1", "Which city?", "", "Rome", accepted=("Rome", "Roma"))),
]


@pytest.mark.parametrize(("form", "question"), KINDS_OF_ANSWER)
def test_made_up_completions_are_right_wrong_ill_formed_and_empty(form, question):
    right, wrong, ill_formed, empty = made_up(question, form)
    accepted = question.accepted or (question.label,)
    assert form.is_right(form.parse(right).answer, accepted)
    assert form.parse(wrong).well_formed and not form.is_right(form.parse(wrong).answer, accepted)
    assert ill_formed and not form.parse(ill_formed).well_formed and empty == ""


def test_where_no_answer_is_right_completions_are_texts():
    assert len(made_up(Question("1", "Write.", "", ""), AnswerFormat(kind="none"))) == KINDS


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_the_trial_changes_no_random_number():
    def draws_some(completions):
        return [sum(draws()) for _ in completions]

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(7)
    alone = draws()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(7)
    assert tried(draws_some) == [] and draws() == alone
