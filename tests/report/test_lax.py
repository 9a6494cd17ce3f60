"""Lax figures stand below the strict ones, with what each parser takes for the answer."""

from grpo_ds.report.lax import HEADING, lax_block, lax_lines
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import grade
from grpo_ds.task.lax import PARSERS, lax_grades
from grpo_ds.task.questions import Question

QUESTIONS = [Question(str(i), f"Is it {i}?", "", label) for i, label in enumerate(["yes", "yes", "no"])]
STRICT = grade([None, "yes", None], QUESTIONS, labels=("yes", "no"))
LAX = lax_grades(["Yes.", "yes", "I do not know."], ["yes or no? "] * 3, QUESTIONS, AnswerFormat())


def figures(line):
    return " ".join(line.partition("(")[0].split())


def test_the_strict_line_comes_first_and_every_line_says_what_it_takes():
    heading, *lines = lax_lines(STRICT, LAX).splitlines()
    assert heading == HEADING and [line.split()[0] for line in lines] == ["strict", *PARSERS]
    assert [line.endswith(f"({takes})") for line, takes in zip(lines[1:], PARSERS.values(), strict=True)] == [True] * 3
    # strict: 1 of 3 right; F1 of yes 2/3, of no 0
    assert figures(lines[0]) == "strict accuracy 33.3% macro-F1 0.333 answered 33.3%"
    # last label: yes, yes, none
    assert figures(lines[1]) == "last_label accuracy 66.7% macro-F1 0.500 answered 66.7%"
    # any label: none ("Yes" is not "yes"), yes, no ("know")
    assert figures(lines[2]) == "any_label accuracy 66.7% macro-F1 0.833 answered 66.7%"


def test_the_block_of_a_parser_has_its_figures():
    block = lax_block(LAX)
    assert [*block] == [*PARSERS]
    last = block["last_label"]
    assert (last["accuracy"], last["answered"], last["predicted"]) == (2 / 3, 2 / 3, {"yes": 2, "no": 0})
    assert last["recall"] == {"yes": 1.0, "no": 0.0} and last["macro_f1"] == 0.5
    assert last["accuracy_interval"] == LAX["last_label"].accuracy_interval
