"""The console: plain lines in a file, a live view at a terminal, no markup from user text."""

import io
from itertools import count
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from grpo_ds.memory.plan import make_plan
from grpo_ds.models.presets import EMBEDDED
from grpo_ds.models.shapes import shape_of
from grpo_ds.report.console import Console
from grpo_ds.report.held_out import grades
from grpo_ds.report.live import LOSS_NOTE, above_floor, clock, sparkline
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import Evaluation, grade, graded
from grpo_ds.task.questions import Question
from tests.training.test_training import ROOT

STEP = {
    "step": 1, "reward": 1.2, "rewards/correctness/mean": 0.9, "rewards/format/mean": 0.3, "accuracy": 0.45,
    "rewards/correctness/std": 0.7, "completions/mean_length": 31.0,
    "kl": 0.0521, "kl_floor": 0.0021, "tokens_per_second": 12.0, "loss": 0.0004,
    "seconds/sample": 9.8, "seconds/update": 3.1, "memory/ram_gib": 5.5,
}  # fmt: skip
ROW = {"question": "Does [red]it[/]?", "label": "yes", "completion": "<answer>yes</answer>\n\x1b[2J", "reward": 2.0,
       "rewards/correctness": 2.0, "rewards/mine": None, "advantage": 0.5}  # fmt: skip


def console(terminal, **options):
    made, written = Console(**options), io.StringIO()
    made._rich = RichConsole(file=written, force_terminal=terminal, highlight=False, soft_wrap=True, width=120)
    made._is_live = terminal
    return made, written


def trained(made, steps=1):
    """Show steps as run.py does, with an evaluation and a warning between them."""
    history = []
    with made.training(steps, history, lambda: "update"):
        for step in range(1, steps + 1):
            history.append({**STEP, "step": step})
            made.step(STEP, step=step, total=steps, seconds_left=100)
            with made.progress("After step 1", 3) as advance:
                advance(2, 10)
                made.line("Warning: [bold]mind this[/]")


def test_a_step_is_one_line_in_a_file_reward_first_and_loss_last():
    made, written = console(terminal=False)
    trained(made)
    said, line, warning = written.getvalue().splitlines()
    assert said == LOSS_NOTE and "\x1b" not in line and warning == "Warning: [bold]mind this[/]"
    names = ["reward 1.20 (correctness 0.90 format 0.30)", "accuracy 45%", "kl 0.0521 (floor 0.0021)", "length 31",
             "12 tok/s", "sample 9.8", "RAM 5.5G", "loss +0.0004", "left 1:40"]  # fmt: skip
    places = [line.index(name) for name in names]
    assert places == sorted(places)


def test_a_terminal_shows_one_view_that_grows_and_keeps_what_is_said_above_it():
    made, written = console(terminal=True)
    trained(made, steps=3)
    text = written.getvalue()
    last = text[text.rindex("Training") :]
    places = [last.index(name) for name in ("3/3", "reward", "correctness", "accuracy", "KL above its floor", "loss")]
    assert places == sorted(places)
    assert "0.0500" in last and "left 1:40" in last and "sample 9.8" in last and "RAM 5.5G" in last
    assert text.count("Warning: [bold]mind this[/]") == 3 and made._view is None
    assert "now: After step 1: 2 of 3 questions" in text  # the live view is drawn anew above each line


def every_line_is_due(**options):
    """A console whose clock makes half a minute pass between two reads."""
    return console(now=map(float, count(0, 30)).__next__, **options)


def work(made):
    with made.progress("Evaluation", 3) as advance:
        advance(1, 60)


def test_long_work_prints_lines_in_a_file_and_none_at_a_terminal():
    made, written = every_line_is_due(terminal=False)
    work(made)
    begun, going = written.getvalue().splitlines()
    assert begun == "Evaluation: 3 questions to do" and going.startswith("Evaluation: 1 of 3 questions, ")
    made, written = every_line_is_due(terminal=True)
    work(made)  # a bar
    assert "1/3" in written.getvalue() and "questions" not in written.getvalue()


def test_within_the_live_view_progress_is_its_last_line_and_no_other():
    made, written = every_line_is_due(terminal=True)
    trained(made)
    text = written.getvalue()
    assert text.count("After step 1: ") == text.count("now: After step 1: ") > 0


def test_any_line_of_the_run_lets_progress_wait_another_half_minute():
    time = [0.0]
    made, written = console(terminal=False, now=lambda: time[0])
    with made.progress("Evaluation", 9) as advance:
        for time[0], line in ((29, True), (58, False), (59, False)):
            if line:
                made.line("Warning")
            advance(1, 1)
    assert written.getvalue() == "Warning\nEvaluation: 3 of 9 questions, 0 tokens/s, about 2 min left\n"


def test_progress_stays_out_of_the_stream_of_results(capsys):
    made, written = every_line_is_due(terminal=False, prints_results=True)
    work(made)
    made.line("{}")
    captured = capsys.readouterr()
    assert (written.getvalue(), captured.out) == ("{}\n", "") and captured.err.count("Evaluation: ") == 2


def test_rank_0_counts_for_all_and_the_others_are_silent(capsys):
    made, written = every_line_is_due(terminal=False, ranks=2)
    work(made)
    assert "2 of 3 questions, " in written.getvalue()
    work(Console(speaks=False, now=map(float, count(0, 30)).__next__))
    assert capsys.readouterr() == ("", "")


def test_the_view_closes_when_a_run_fails_in_it():
    made, written = console(terminal=True)
    with pytest.raises(KeyError), made.training(2, [], lambda: "sample"):
        raise KeyError
    assert made._view is None and "first step: sample" in written.getvalue()
    assert written.getvalue().count("\x1b[?25l") == written.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_what_was_not_finite_leaves_a_gap():
    made, written = console(terminal=True)
    with made.training(2, [STEP, {**STEP, "loss": None, "kl": None}], lambda: ""):
        pass
    assert "-" in written.getvalue() and above_floor({"kl": None, "kl_floor": 0.1}) is None
    assert sparkline([0.0, None, 7.0, 3.0]) == "▁ █▄" and sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""


def test_without_a_reference_there_is_no_floor():
    made, written = console(terminal=True)
    with made.training(1, [{k: v for k, v in STEP.items() if k != "kl_floor"}], lambda: ""):
        pass
    assert "KL" not in written.getvalue()


def test_the_first_four_completions_are_shown_as_text_with_what_they_earned():
    made, written = console(terminal=False)
    made.samples([ROW] * 6)
    text = written.getvalue()
    made.samples([ROW, {**ROW, "question": "Which?\nA. it\nB. not", "label": "B"}])
    assert text.count("Does [red]it[/]?  (right: yes)\n") == 1 and "\x1b" not in text
    assert "  Which? A. it B. not  (right: B)\n" in written.getvalue()
    assert text.count("reward 2.00 (correctness 2.00)") == 4  # what does not apply is not said


def test_a_completion_out_of_form_says_which_rule_it_breaks():
    made, written = console(terminal=False)
    made.samples([ROW, {**ROW, "broken_rule": "text after the answer"}])
    assert written.getvalue().count("reward 2.00 (correctness 2.00)  text after the answer\n") == 1
    question = Question(id="1", text="?", context="", label="yes")
    form = AnswerFormat()
    texts = ["yes", form.write("", "yes"), "no", form.write("So.", "yes")]
    made.grades("Before training", graded(texts, [question] * 4, form))
    assert written.getvalue().splitlines()[-1] == "Ill-formed: 2 x no tags; 1 x empty reasoning"


def test_a_long_prompt_is_shown_without_its_middle():
    made, written = console(terminal=False)
    made.prompt("17", "<|im_start|>system\nAnswer.", tokens=9)
    made.prompt("18", "b" * 700 + "m" * 1234 + "e" * 500, tokens=900)
    short, long = written.getvalue().split("The first prompt, ")[1:]
    assert short == "question 17, 9 tokens:\n<|im_start|>system\nAnswer.\n"
    assert long == f"question 18, 900 tokens:\n{'b' * 700} [... 1234 characters ...] {'e' * 500}\n"


def test_the_plan_is_a_table_with_the_memory_that_is_available():
    config = TrainConfig(model=EMBEDDED)
    ds = resolve_ds_config(ROOT / "ds_configs/zero2.json", fill=config.ds_sizes(native="fp32"), explicit=frozenset())
    plan = make_plan(shape_of(EMBEDDED), config, ds, device="cuda")
    made, written = console(terminal=False)
    made.plan(plan, 15.9, 31.3)
    made.plan(plan, None, 31.3)
    text = written.getvalue()
    words = ("GPU memory", "RAM", "available", "15.9", "31.3", "update", "resume")
    assert [word in text for word in words] == [True] * 7
    assert text.count("GPU memory") == 1 and text.count("RAM") == 2  # no column for a card that is not there


def test_before_and_after_carry_interval_test_and_baseline():
    labels = ["yes"] * 6 + ["no"] * 4
    questions = [Question(id=str(i), text="?", context="", label=label) for i, label in enumerate(labels)]

    def answered(answers):
        right = [answer == question.label for answer, question in zip(answers, questions, strict=True)]
        return Evaluation(answers, answers, grade(answers, questions, labels=("yes", "no")), right)

    before, after = answered([None] * 10), answered(["yes"] * 10)
    made, written = console(terminal=False)
    made.before_and_after(before, after, questions)
    text = written.getvalue()
    # 6 gained, none lost: 2 * (1/2)**6 = 0.03125.
    for words in (
        "60.0%",
        "31.3% to 83.2%",
        "McNemar p = 0.031",
        "Majority baseline (always the most common label): 60.0%",
    ):
        assert words in text
    assert grades(questions, {"before": before, "after": after})["mcnemar"] == 0.03125


def test_time_is_said_as_a_clock():
    assert [clock(s) for s in (0, 61.9, 3600, 36_061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]


def test_stale_memory_is_explained_where_freed_memory_is_kept():
    from grpo_ds.memory.phases import PhaseUse

    use = PhaseUse("update", 1.0, 2**30, 0, 0, 0)
    for exact, said in ((False, True), (True, False)):
        made, written = console(terminal=False)
        made.memory(SimpleNamespace(uses=lambda: {"update": use}, plan=None, exact=exact))
        assert ("Freed memory is kept" in written.getvalue()) == said
