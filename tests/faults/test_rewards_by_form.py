"""A completion that breaks the answer contract earns nothing for its answer; one that keeps to it earns it all."""

import re
import sys

import pytest
import torch

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import grade
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import READY_MADE, ready_made
from grpo_ds.task.scoring import score
from grpo_ds.training.prompt_style import PromptStyle
from grpo_ds.training.sampling import Completions
from tests.faults.ill_formed import BENIGN, GOOD, ILL_FORMED, TAGS
from tests.faults.matcher import split_counting_steps

FORMAT = AnswerFormat(("yes", "no"))
QUESTION = Question(id="1", text="Did it fall?", context="It fell by half.", label="yes")
READY = ready_made(answer_format=FORMAT)
FUNCTIONS = {name: (READY[name], 1.0) for name in ("correctness", "format")}


def earned(completion):
    rewards = score([completion], [QUESTION], functions=FUNCTIONS)
    return rewards.by_name["correctness"][0], rewards.by_name["format"][0]


@pytest.mark.parametrize(("why", "completion"), ILL_FORMED)
def test_an_ill_formed_completion_earns_nothing_for_its_answer(why, completion, tried):
    correctness, form = earned(completion)
    assert correctness == 0, why
    # docs/rewards.md: 0.2 for each pair that occurs once, spelled exactly, whatever else is wrong.
    pairs = sum(completion.count(first) == completion.count(last) == 1 for first, last in (TAGS[:2], TAGS[2:]))
    assert form in {0.2 * count for count in range(pairs + 1)}, why
    assert grade([FORMAT.parse(completion).answer], [QUESTION], labels=FORMAT.labels).accuracy == 0
    tried("ill-formed completions", "earned nothing")


@pytest.mark.parametrize(("why", "completion"), BENIGN)
def test_a_benign_variant_earns_the_full_reward(why, completion, tried):
    assert earned(completion) == (2.0, 0.4), why
    tried("benign variants", "passed")


def test_there_are_enough_cases_and_no_two_are_equal():
    assert len({completion for _, completion in ILL_FORMED}) == len(ILL_FORMED) >= 200
    assert len({completion for _, completion in BENIGN}) == len(BENIGN) >= 40
    assert not {completion for _, completion in ILL_FORMED} & {completion for _, completion in BENIGN}


def test_no_ill_formed_completion_earns_as_much_as_a_right_answer():
    best = max(sum(earned(completion)) for _, completion in ILL_FORMED)
    assert best == 0.4 < 2.0


@pytest.mark.parametrize("where", range(len(GOOD)))
def test_a_control_token_that_the_model_samples_is_not_hidden_from_rewards(tokenizer, where, tried):
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [*tokenizer.encode(GOOD[:where]), start, *tokenizer.encode(GOOD[where:])]
    assert earned(text_of(tokenizer, ids)) == (0, 0)
    tried("control tokens in a good completion", "earned nothing")


def test_the_control_token_that_ends_a_completion_is_not_part_of_it(tokenizer):
    ids = tokenizer.encode(GOOD)
    assert text_of(tokenizer, [*ids, tokenizer.eos_token_id]) == text_of(tokenizer, ids) == GOOD
    assert text_of(tokenizer, []) == ""


def text_of(tokenizer, ids):
    style = PromptStyle(FORMAT, few_shot=0, prefill=False, max_prompt_length=8)
    row = torch.tensor([ids], dtype=torch.long)
    return style.texts(tokenizer, Completions(row, torch.ones_like(row, dtype=torch.bool), torch.tensor([True])))[0]


ADVERSARIAL = [
    *("<", "< ", "</", "<|", "<answer", "<answer ", "</answer", "<answer>", "<reasoning>", "</reasoning", "<|a", "|>"),
    *(">", " ", "a", ".", "<>", "<a>", "<answer<", "yes ", "\u200b", "<answer |>", "<reasoning></reasoning>"),
]
OPENINGS = ["", "<", "</", "< /", "<|", "<answer", "<answer ", "</ answer", "<reasoning>", "<reasoning><"]


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("unit", ADVERSARIAL)
def test_twice_the_text_takes_at_most_twice_the_work(unit, opening, tried):
    """Work is counted in steps of a backtracking matcher on the parser's pattern, and in calls of functions."""
    short, long = opening + unit * 200, opening + unit * 400
    assert pattern_steps(long) <= 2.05 * pattern_steps(short)
    assert calls(long) <= 2.05 * calls(short)
    tried("adversarial texts, doubled", "twice the work at most")


def pattern_steps(text):
    pieces, steps = split_counting_steps(FORMAT.tag_pattern, text)
    assert "".join(pieces) == text
    return steps


def calls(text):
    """Count calls of Python and C functions while all ready-made reward functions score the text."""
    count = 0

    def on_event(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        for name in READY_MADE:
            READY[name](completions=[text], label=["yes"])
    finally:
        sys.setprofile(None)
    return count


def test_the_counting_matcher_splits_like_re():
    for _, completion in ILL_FORMED + BENIGN:
        pieces, _ = split_counting_steps(FORMAT.tag_pattern, completion)
        assert pieces == re.split(f"({FORMAT.tag_pattern})", completion, flags=re.IGNORECASE)


def test_the_counting_matcher_detects_quadratic_work():
    counts = [split_counting_steps(r"<\s*/?\s*a", "<" + " " * size)[1] for size in (200, 400)]
    assert counts[1] > 3.5 * counts[0]
