"""Lax parsers: what they take for an answer, by tables with reasons, and against naive readings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import grade, graded
from grpo_ds.task.lax import PARSERS, any_label, last_label, lax_grades
from grpo_ds.task.prompts import build_messages
from grpo_ds.task.questions import Question

LABELS = ("yes", "no")
FORMAT = AnswerFormat(LABELS)
GOOD = "<reasoning>It fell.</reasoning><answer>no</answer>"

# (text, last_label, any_label)
READ = [
    (GOOD, "no", "no"),  # the strict answer as well
    ("<reasoning>Not yes.</reasoning><answer>no</answer>", "no", "yes"),  # any yes comes before any no
    ("<answer>No", "no", None),  # no form needed, but any_label keeps to the letters of --labels
    ("Yes.", "yes", None),
    ("It is yes, or rather no!", "no", "yes"),  # the last word; the first label
    ("I do not know.", None, "no"),  # "not" and "know" are other words, and hold the letters
    ("Eyes were examined.", None, "yes"),
    ("The diagnosis was wrong.", None, "no"),
    ("yes_1 or no2", None, "yes"),  # a letter, digit or _ beside it makes another word
    ("**yes**", "yes", "yes"),  # signs do not
    ("It fell by half.", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "last", "anywhere"), READ)
def test_what_a_lax_parser_takes_for_the_answer(text, last, anywhere):
    assert (last_label(text, LABELS), any_label(text, LABELS)) == (last, anywhere)


OTHER_LABELS = [
    (("effect", "no effect"), "There was no effect", "no effect"),  # the longer label, not its last word
    (("no", "no effect"), "There was no effect", "no effect"),  # nor its first
    (("A", "B"), "It is B, as a trial showed.", "B"),  # the article is no choice
    (("A", "B"), "a", None),
    (("ja", "nej", "måske"), "MA\u030aSKE", "måske"),  # in the other Unicode form
    (("+", "-"), "p < 0.05 (+)", "+"),
]


@pytest.mark.parametrize(("labels", "text", "last"), OTHER_LABELS)
def test_the_last_of_other_labels(labels, text, last):
    assert last_label(text, labels) == last


PIECES = ["yes", "no", "Yes", "NO", "know", "eyes", " ", ". ", "<answer>", "</answer>", "x"]
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)


@settings(deadline=None)  # the cores are shared
@given(TEXTS)
def test_the_last_label_is_the_last_word_that_is_one(text):
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    assert last_label(text, LABELS) == next((word for word in reversed(words) if word in LABELS), None)


@settings(deadline=None)  # the cores are shared
@given(TEXTS)
def test_any_label_finds_letters_wherever_they_are(text):
    found = [label for label in LABELS if any(text[i : i + len(label)] == label for i in range(len(text)))]
    assert any_label(text, LABELS) == (found[0] if found else None)


@settings(deadline=None)  # the cores are shared
@given(TEXTS, st.sampled_from(LABELS))
def test_a_strict_answer_is_the_last_label_too(reasoning, label):
    text = FORMAT.write(f"It fell. {reasoning}", label)
    assert FORMAT.parse(text).answer in (None, last_label(text, LABELS))  # None: tags in the reasoning


def questions_with(labels):
    return [Question(str(i), f"Is it {i}?", "It is not.", label) for i, label in enumerate(labels)]


def prompts_of(questions):
    chats = [build_messages(q, answer_format=FORMAT, few_shot=0) for q in questions]
    return ["\n".join(turn["content"] for turn in chat) for chat in chats]


@pytest.mark.parametrize("answer", ["", "I do not know.", GOOD, "<reasoning>.</reasoning>", "Yes."])
def test_with_our_prompt_in_front_every_model_says_yes(answer):
    """The prompt names both labels, so the accuracy is the share of yes, whatever is answered."""
    questions = questions_with(["yes"] * 62 + ["no"] * 38)
    grades = lax_grades([answer] * 100, prompts_of(questions), questions, FORMAT)["any_label_with_prompt"]
    assert (grades.accuracy, grades.well_formed, grades.predicted) == (0.62, 1.0, {"yes": 100, "no": 0})
    assert grades.recall == {"yes": 1.0, "no": 0.0} and grades.collapsed


def test_with_our_prompt_in_front_a_model_that_knows_everything_is_no_better():
    questions = questions_with(["yes"] * 62 + ["no"] * 38)
    texts = [FORMAT.write("It fell.", q.label) for q in questions]
    lax = lax_grades(texts, prompts_of(questions), questions, FORMAT)
    assert graded(texts, questions, FORMAT).grades.accuracy == 1.0
    assert {name: its.accuracy for name, its in lax.items()} == {
        "last_label": 1.0, "any_label": 1.0, "any_label_with_prompt": 0.62,
    }  # fmt: skip


def test_each_parser_is_graded_as_its_answers_are():
    questions = questions_with(["yes", "yes", "no", "no"])
    texts, prompts = ["Yes.", "no", "eyes", GOOD], ["", "yes or no? ", "", "yes or no? "]
    lax = lax_grades(texts, prompts, questions, FORMAT)
    read = {
        "last_label": ["yes", "no", None, "no"],
        "any_label": [None, "no", "yes", "no"],
        "any_label_with_prompt": [None, "yes", "yes", "yes"],
    }
    assert lax == {name: grade(answers, questions, labels=LABELS) for name, answers in read.items()}
    assert lax.keys() == PARSERS.keys()


def test_a_prompt_for_each_text():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        lax_grades(["yes"], [], questions_with(["yes"]), FORMAT)
