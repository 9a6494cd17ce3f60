"""--reward_funcs: functions found by name or in a file, and their problems reported before a model is loaded."""

from pathlib import Path

import pytest

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.reward_files import find_reward_functions, reward_problems
from grpo_ds.task.rewards import ready_made
from grpo_ds.task.scoring import score

MY_REWARDS = Path(__file__).resolve().parents[1] / "data" / "my_rewards.py"
READY_MADE = ready_made(answer_format=AnswerFormat())


def find(reward_funcs, reward_weights=None, columns=()):
    return find_reward_functions(reward_funcs, reward_weights, ready_made=READY_MADE, columns=columns)


def test_the_example_file_works_beside_the_ready_made_functions(tmp_path):
    entries = f"correctness, {MY_REWARDS}:concise,{MY_REWARDS}:cites_the_year"
    functions = find(entries, "1, 0.5,2", columns=("year",))
    records = [Question(str(i), "Q?", "C.", "yes", columns={"year": year}) for i, year in enumerate((1999, None))]
    answer = AnswerFormat().write("In 1999 it did. " + "so " * 48, "yes")  # 53 words, 13 too many
    rewards = score([answer, answer], records, functions=functions)
    assert rewards.by_name == {
        "correctness": [2.0, 2.0],
        "concise": pytest.approx([-0.065, -0.065]),
        "cites_the_year": [2.0, None],
    }


def test_the_guide_shows_the_example_file_unchanged():
    guide = (MY_REWARDS.parents[2] / "docs" / "rewards.md").read_text()
    assert MY_REWARDS.read_text() in guide


FILES = [  # source, FUNCTION, what the error must say
    (None, "f", ["there is no file", "rewards.py"]),
    ("def g(**_): pass", "f", ["has no function 'f'"]),
    ("f = 3", "f", ["has no function 'f'"]),
    ("def f(:", "f", ["importing it fails with SyntaxError", "line 1"]),
    ("x = 1\n\ny = x / 0", "f", ["importing it fails with ZeroDivisionError: division by zero", "line 3: y = x / 0"]),
    ("import json\njson.loads('')", "f", ["JSONDecodeError", "line 2: json.loads('')"]),  # the file's own line
    ("import nowhere_at_all", "f", ["ModuleNotFoundError: No module named 'nowhere_at_all'"]),
    ("raise SystemExit(3)", "f", ["importing it fails with SystemExit: 3"]),
    ("import asyncio\nraise asyncio.CancelledError", "f", ["importing it fails with CancelledError (", "line 2"]),
    ("class E(BaseException):\n    def __str__(self): raise self\nraise E", "f", ["importing it fails with E ("]),
    ("def __getattr__(name): raise GeneratorExit(name)", "f", ["importing it fails with GeneratorExit: "]),
    ("class f:\n    def __init__(self): raise GeneratorExit", "f()", ["calling it fails with GeneratorExit"]),
    (
        "class F:\n    def __getattr__(self, name): 1 / 0\n    def __call__(self): 1\nf = F()",
        "f",
        ["looking at it fails"],
    ),
    ("def f(completions, yaer, **_): pass", "f", ["asks for 'yaer'", "question, context, label, year", "mean year?"]),
    ("def f(prompts, /, **_): pass", "f", ["prompts can only be given by position"]),
    ("def f(*completions): pass", "f", ["takes no argument by name", "**kwargs"]),
    ("class f: pass", "f", ["is a class", "f()"]),
    ("class f: pass", "f()", ["what f() makes cannot be called", "__call__"]),
]


@pytest.mark.parametrize(("source", "name", "parts"), FILES)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, source, name, parts):
    path = tmp_path / "rewards.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UsageError) as error:
        find(f"correctness,{path}:{name}", columns=("year",))
    message = str(error.value)
    assert f"{path}:{name}: " in message and "docs/rewards.md" in message
    assert [part for part in parts if part not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", ["~nobody-of-this-name/rewards.py", "x" * 300 + ".py", "a\0.py", "."])
def test_a_path_that_no_file_can_have_is_reported_like_a_missing_file(path):
    with pytest.raises(UsageError, match="there is no file"):
        find(f"{path}:f")


def test_a_file_may_use_dataclasses_and_other_files_of_its_folder(tmp_path):
    (tmp_path / "beside_the_rewards.py").write_text("WORTH = 7.0")
    (tmp_path / "uses.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_rewards import WORTH\n"
        "@dataclass\nclass Fixed:\n    worth: float = WORTH\n"
        "    def __call__(self, completions, **_): return [self.worth for _ in completions]\n"
        "fixed = Fixed()"
    )
    rewards = score(["a"], [Question("1", "Q?", "", "yes")], functions=find(f"{tmp_path / 'uses.py'}:fixed"))
    assert rewards.by_name == {"fixed": [7.0]}


FLAGS = [
    ("correctness,format", None, None),
    ("format", "2", None),
    ("correctness, f.py:g", " 1,0.5 ", None),  # spaces are ignored
    (
        "correctnes",
        None,
        "'correctnes' is neither correctness, format, length_penalty, repetition_penalty, bare_label,",
    ),
    ("trl.rewards.think_format_reward,a.b.C()", None, None),
    ("my_rewards.py", None, "'my_rewards.py' is neither"),  # a file without a function
    (":format", None, "':format' is neither"),
    ("a.py:Judge(),b.Judge", None, "names 'Judge' twice"),
    ("", None, "'' is neither"),
    ("format,format", None, "names 'format' twice"),
    ("a.py:f,b.py:f", None, "names 'f' twice"),
    ("format,a.py:format", None, "names 'format' twice"),
    ("a.py:correctness", None, "a.py:correctness has the name of one of ours, correctness, format, length_penalty"),
    ("a.b.overlong()", None, "a.b.overlong() has the name of one of ours"),  # the penalty of --overlong_buffer
    ("correctness,format", "1", "needs 2 numbers"),
    ("format", "1,1", "needs 1 number,"),
    ("format", "x", "reward_weights is x"),
    ("format", "nan", "reward_weights is nan"),
    ("format", "", "reward_weights is "),
]


@pytest.mark.parametrize(("reward_funcs", "reward_weights", "problem"), FLAGS)
def test_flags_that_cannot_work_are_named_before_any_file_is_opened(reward_funcs, reward_weights, problem):
    problems = reward_problems(reward_funcs, reward_weights)
    assert len(problems) == (problem is not None) and all(problem in line for line in problems), problems
