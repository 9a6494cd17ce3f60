"""Figures of an evaluation in the console's table, on the page and on the card, also if one side has none."""

import json
import re

from grpo_ds.report.figures import UNKNOWN, confidence_rows, grade_rows, mean_change_lines
from grpo_ds.report.held_out import grades, paired_tests, write_held_out
from grpo_ds.report.key_figures import grades_table, tiles
from grpo_ds.report.model_card import write_card
from grpo_ds.report.page import page
from grpo_ds.report.run_files import RunFiles, read_run
from grpo_ds.report.trackers import write_summary
from grpo_ds.task.answer_probs import AnswerProbs
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import graded
from grpo_ds.task.questions import Question
from tests.report.finished import finished

FORM = AnswerFormat(("yes", "no"))
QUESTIONS = [Question(str(i), f"q{i}", "", label) for i, label in enumerate(["yes", "yes", "no", "yes"])]
RIGHT = "<reasoning>a</reasoning><answer>yes</answer>"


def evaluation(*p_yes, empty=0.5, misled=None, sampled=None):
    probs = [AnswerProbs((p, 1 - p), (empty, 1 - empty), misled and (misled, 1 - misled)) for p in p_yes]
    return graded([RIGHT] * 4, QUESTIONS, FORM, probs or None, sampled)


BEFORE = evaluation(0.5, 0.5, 0.5, 0.5)
AFTER = evaluation(0.9, 0.8, 0.4, 0.7, misled=0.2, sampled=[["yes"], ["yes"], ["no"], ["no"]])  # p(right) 0.75


def rows(*sides):
    figures = [side.figures() for side in sides]
    made = {name: [show(side) for side in figures] for name, show in [*grade_rows(figures), *confidence_rows(figures)]}
    return {name.strip(): cells for name, cells in made.items()}


def test_every_figure_has_a_row_by_hand():
    found = rows(BEFORE, AFTER)
    assert found["accuracy"] == ["75.0%", "75.0%"] and found["mean p(right)"] == ["0.500", "0.750"]
    assert found["p(right), empty reasoning"] == ["0.500", "0.500"] and found["reasoning gain"] == ["+0.000", "+0.250"]
    assert found["lean, mean p (classes: yes 75%, no 25%)"] == ["yes 50%, no 50%", "yes 70%, no 30%"]
    assert found["accuracy if misled"] == [UNKNOWN, "25.0%"] and found["accuracy of 1 votes"] == [UNKNOWN, "75.0%"]
    assert found["well-formed up to the answer"] == ["100.0%", "100.0%"]


def test_a_side_without_probabilities_is_said_to_be_unknown_and_two_have_no_rows():
    assert rows(evaluation(), AFTER)["mean p(right)"] == [UNKNOWN, "0.750"]
    assert not [name for name in rows(evaluation(), evaluation()) if "p(right)" in name or "lean" in name]
    assert [*paired_tests(QUESTIONS, evaluation(), AFTER)] == ["mcnemar"]


def test_the_change_is_a_line_with_interval_and_test():
    # Changes 0.4, 0.3, 0.1, 0.2: all sixteen flips, of which two reach the sum.
    found = paired_tests(QUESTIONS, BEFORE, AFTER)
    low, high = found["p_right_change_interval"]
    assert mean_change_lines(found) == [
        f"Change of mean p(right): +0.250, 95 % interval {low:+.3f} to {high:+.3f}, paired test p = 0.125"
    ]
    assert 0.1 <= low < 0.25 < high <= 0.4


def test_page_and_card_show_what_the_files_of_the_run_hold(tmp_path):
    folder = finished(tmp_path / "run")
    evaluations = {"before": BEFORE, "after": AFTER}
    write_held_out(folder, QUESTIONS, evaluations, None)
    write_summary(folder, {"steps": 7, **grades(QUESTIONS, evaluations), "questions": {"train": 40, "held_out": 4}})
    of = json.loads((folder / "held_out.json").read_text())["questions"][2]["after"]
    assert of["p"] == {"yes": 0.4, "no": 0.6} and of["p_empty"] == {"yes": 0.5, "no": 0.5} and of["reasoned"]
    assert of["p_misled"] == {"yes": 0.2, "no": 0.8} and of["sampled"] == ["no"]
    run = read_run(folder)
    assert dict(grades_table(run))["Mean p(right)"] == ["0.500", "0.750"]
    assert [tile.value for tile in tiles(run) if tile.name == "Mean p(right)"] == ["0.750"]
    shown = page(run)
    assert re.search(r"p\(right\)</bdi> 0\.60", shown) and "held-out questions, mean p(right)" in shown
    card = write_card(folder).read_text()
    assert "| mean p(right) | 0.500 | 0.750 |" in card and "Change of mean p(right): +0.250" in card


def test_a_run_of_an_older_version_has_neither_row_nor_tile(tmp_path):
    run = read_run(finished(tmp_path / "run"))
    assert not any("p(right)" in name for name, _ in grades_table(run))
    assert not any("p(right)" in tile.name for tile in tiles(run)) and "p(right)" not in page(run)
    assert tiles(RunFiles("empty")) == []
