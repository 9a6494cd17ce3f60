"""Lines about long work: at most one in half a minute, and only where nothing else was printed."""

import pytest

from grpo_ds.report.long_work import SILENCE, ProgressLines, Work
from tests.conftest import check_example


class Time:
    """A clock that tests set, and the lines printed with it."""

    def __init__(self):
        self.now, self.lines = 0.0, []
        self.progress = ProgressLines(lambda text: self.lines.append((self.now, text)), lambda: self.now)

    def at(self):
        return [when for when, _ in self.lines]


def test_the_example_is_right():
    check_example(Work)


@pytest.mark.parametrize(
    ("done", "tokens", "seconds", "text"),
    [
        (0, 0, 0.0, "W: 8 rows to do"),  # nothing is divided by 0
        (0, 90, 30.0, "W: 0 of 8 rows, 3 tokens/s"),  # a batch that goes on says nothing about the time left
        (2, 90, 30.0, "W: 2 of 8 rows, 3 tokens/s, about 2 min left"),  # 15 s each, six left
        (7, 0, 30.0, "W: 7 of 8 rows, about 1 min left"),  # never 0
        (8, 90, 30.0, "W: 8 of 8 rows, 3 tokens/s"),
    ],
)
def test_progress_is_text_with_what_is_known(done, tokens, seconds, text):
    assert Work("W", 8, "rows", done=done, tokens=tokens).text(seconds) == text


def test_a_step_says_how_many_tokens_it_may_draw_at_most():
    text = Work("Step 3 of 60, sampling", 8, "completions", most_tokens=2048, done=1, tokens=500).text(50.0)
    assert (
        text == "Step 3 of 60, sampling: 1 of 8 completions, 500 of at most 2048 tokens, 10 tokens/s, about 6 min left"
    )


def test_long_work_prints_a_line_every_half_minute_and_short_work_none():
    time = Time()
    with time.progress.follow(Work("W", 100, "rows")) as advance:
        for second in range(1, 101):
            time.now = float(second)
            advance(1, 5)
    assert time.at() == [30, 60, 90] and SILENCE == 30
    assert time.lines[1] == (60, "W: 60 of 100 rows, 5 tokens/s, about 1 min left")
    with time.progress.follow(Work("short", 9, "rows")) as advance:
        advance(9, 9)
    assert len(time.lines) == 3


def test_a_line_of_another_kind_counts_as_a_sign_of_life():
    time = Time()
    for step in range(10):  # each of 20 seconds, printed at its end
        with time.progress.follow(Work(f"step {step}", 20, "rows")) as advance:
            for _ in range(20):
                time.now += 1
                advance(1, 1)
        time.progress.printed()
    assert time.lines == []


def test_work_that_begins_after_a_silence_is_named():
    time = Time()
    time.now = 200.0  # a model was loaded
    with time.progress.follow(Work("Evaluation", 89, "questions")):
        pass
    assert time.lines == [(200, "Evaluation: 89 questions to do")]


def test_work_may_be_announced_at_once():
    time = Time()
    with time.progress.follow(Work("Evaluation", 89, "questions"), announce=True) as advance:
        for time.now in (29.0, 30.0):
            advance(1, 0)
    assert time.at() == [0, 30]


def test_work_that_fails_is_no_longer_shown():
    time = Time()
    with pytest.raises(KeyError), time.progress.follow(Work("W", 1, "rows")):
        assert time.progress.text() == "W: 1 rows to do"
        raise KeyError
    assert time.progress.text() == ""


def test_unequal_shares_of_ranks_never_make_more_than_all():
    work = Work("Evaluation", 89, "questions")  # rank 0 of two answers 45
    work.add(2 * 45, 0)
    assert work.done == 89
