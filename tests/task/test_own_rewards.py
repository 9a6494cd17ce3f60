"""Reward functions as TRL's users write them run unchanged: arguments, texts or messages, coroutines, objects."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_ds.errors import MAX_LINES, RewardError, UsageError
from grpo_ds.task import reward_calls
from grpo_ds.task.own_rewards import BadFunction, columns_read, own_reward, reads_messages
from grpo_ds.task.questions import Question, read_questions
from grpo_ds.task.reward_files import find_reward_functions, form_lines
from grpo_ds.task.rewards import Prompt
from grpo_ds.task.scoring import Sampled, joined, score

DATA = Path(__file__).resolve().parents[1] / "data"
FILE = DATA / "trl_rewards.py"
TEXTS = [r"<think>2 and 2</think><answer>\boxed{4}</answer>", "Eleven chars"]  # 48 and 12 characters
RECORDS = [
    Question("1", "What is 2+2?", "", "4", columns={"solution": "4", "task": "math"}),
    Question("2", "Why?", "", "", columns={"solution": "5", "task": "code"}),
]
SAMPLED = Sampled(
    [Prompt(f"User: {it.text} ", [{"role": "user", "content": it.text}]) for it in RECORDS],
    [[1, 2, 3], [4]],
    SimpleNamespace(global_step=3, max_steps=4),
)

EARNED = [  # entry, rewards of the two completions, form
    ("tokens", [3.0, 1.0], "text"),
    ("characters", [48.0, 12.0], "text"),
    ("boxed", [1.0, 0.0], "text"),
    ("only_math", [4.0, None], "text"),  # prompt + completion hold four 2s
    ("curriculum", [0.75, 0.75], "text"),
    ("logging", [0.0, 0.0], "text"),
    ("asks_a_judge", [48.0, 12.0], "text"),
    ("of_arrays", [1.0, 0.0], "text"),
    ("of_scalars", [48.0, 12.0], "text"),
    ("after_a_while", [1.0, 1.0], "text"),
    ("judge", [2.0, 2.0], "text"),
    ("AsyncJudge()", [1.0, 1.0], "text"),
    ("needs_arguments", [3.0, 3.0], "text"),
    ("bound", [3.0, 3.0], "text"),
    ("short", [-1.0, -1.0], "text"),
    ("makes_a_reward()", [192.0, 48.0], "text"),
    ("has_form", [1.0, 0.0], "messages"),
    ("in_a_loop", [48.0, 13.0], "messages"),
    ("swallows", [48.0, 12.0], "messages"),
    ("last_turn", [12.0, 4.0], "messages"),
    ("by_annotation", [1.0, 1.0], "messages"),
    ("with_a_helper", [48.0, 12.0], "messages"),
    ("with_map", [48.0, 12.0], "messages"),
    ("with_a_lambda", [48.0, 12.0], "messages"),
    ("from_kwargs", [48.0, 12.0], "messages"),
    ("halved", [24.0, 6.0], "messages"),
    ("decorated", [48.0, 12.0], "messages"),
    ("Messages()", [48.0, 12.0], "messages"),
    ("matches", [48.0, 12.0], "messages"),
    ("awaited_messages", [48.0, 12.0], "messages"),
]


def find(entries, **options):
    columns = ("solution", "task")
    return find_reward_functions(entries, None, ready_made={}, columns=columns, **options)


def earned(functions):
    return score(TEXTS, RECORDS, functions=functions, sampled=SAMPLED, timeout=30)


@pytest.mark.parametrize(("entry", "rewards", "form"), EARNED)
def test_a_function_in_trls_shape_earns_what_it_does_there(entry, rewards, form):
    functions = find(f"{FILE}:{entry}")
    name = entry.removesuffix("()")
    assert functions[name][0].messages == (form == "messages")
    for _ in range(2):  # a coroutine's client outlives a batch
        assert earned(functions).by_name == {name: rewards}


def test_all_of_them_work_side_by_side(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    functions = find(",".join(f"trl_rewards.{entry}" for entry, _, _ in EARNED))  # by import path, as in TRL's flag
    assert earned(functions).by_name == {entry.removesuffix("()"): rewards for entry, rewards, _ in EARNED}
    assert form_lines(functions)[0].count(",") == sum(form == "messages" for _, _, form in EARNED) - 1


def test_a_module_is_looked_up_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "package_of_rewards").mkdir()
    (tmp_path / "package_of_rewards" / "mine.py").write_text("def one(completions): return [1.0] * len(completions)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert earned(find("package_of_rewards.mine.one")).total == [1.0, 1.0]


def test_what_functions_log_is_kept_with_the_rewards():
    rewards = earned(find(f"{FILE}:logging"))
    assert rewards.extra == {"first": ["<", "E"]} and rewards.metrics == {"share": [0.25, 0.75]}
    both = joined([rewards, score(["a"], RECORDS[:1], functions={"logging": (lambda **_: [1.0], 1.0)})])
    assert both.extra == {"first": ["<", "E", None]} and both.metrics == {"share": [0.25, 0.75]}
    assert both.rows([2, 0]).extra == {"first": [None, "<"]}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("log_extra('a', [1])", "log_extra('a') needs 2 values"),
        ("log_metric('a', float('nan'))", "log_metric('a') got nan"),
        ("log_metric('a', 'many')", "could not convert string to float"),
    ],
)
def test_what_cannot_be_logged_is_the_functions_error(tmp_path, call, words):
    (tmp_path / "logs.py").write_text(f"def logs(completions, log_extra, log_metric):\n    {call}\n    return [0, 0]\n")
    with pytest.raises(RewardError, match=r"logs\.py, line 2") as error:
        earned(find(f"{tmp_path / 'logs.py'}:logs"))
    assert words in str(error.value)


BAD = [  # entry, what the error says
    ("AsyncJudge", ["is a class, not an object of it", f"write {FILE}:AsyncJudge()"]),
    ("NeedsArguments", ["is a class", "reward = NeedsArguments(...)"]),
    ("NeedsArguments()", ["calling it fails with TypeError", "worth"]),
    ("FORM", ["has no function 'FORM'"]),
    ("yields", ["is an async generator"]),
    ("judge()", ["calling it fails with TypeError"]),
]


@pytest.mark.parametrize(("entry", "words"), BAD)
def test_what_is_not_a_function_is_named_before_anything_is_loaded(entry, words):
    with pytest.raises(UsageError) as error:
        find(f"{FILE}:{entry}")
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert len(str(error.value).splitlines()) <= MAX_LINES


def test_a_column_that_the_data_lack_is_named_with_those_that_there_are():
    with pytest.raises(BadFunction) as error:
        own_reward(lambda completions, solutions, **_: [], ["question", "label", "solution", "task"])  # each once
    assert str(error.value) == (
        "it asks for 'solutions'; the data's columns are id, question, context, label, solution, task "
        "(did you mean solution?)"
    )


def test_a_function_gets_only_what_it_takes():
    reward = own_reward(lambda completions, task="none": [task], ["task", "year"])
    assert reward(completions=["a"], task="math", year=[1]) == ["math"]


@pytest.mark.parametrize(("form", "other"), [("text", "messages"), ("messages", "text")])
def test_the_flag_decides_the_form_and_the_error_names_it(form, other):
    entry = "has_form" if form == "text" else "boxed"
    functions = find(f"{FILE}:{entry}", completion_format=form)
    with pytest.raises(RewardError, match=f"gets completions as {form}.*--completion_format {other}"):
        earned(functions)
    assert earned(find(f"{FILE}:{entry}", completion_format=other)).by_name == earned(find(f"{FILE}:{entry}")).by_name


LIBRARY = """
def length(completion):
    return len(completion[0]["content"]) if isinstance(completion, list) else len(completion)

def annotated(completions: "list[list[dict[str, str]]]", **kwargs):
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("folder", "call", "messages"),
    [
        ("here", "[length(completion) for completion in completions]", True),
        ("elsewhere", "[length(completion) for completion in completions]", False),  # a library may take either
        ("elsewhere", "annotated(completions, **kwargs)", True),  # as TRL's own are
        ("elsewhere", "[length(annotated) for annotated in 'ab']", False),
    ],
)
def test_of_functions_that_it_calls_those_of_its_folder_are_read(tmp_path, monkeypatch, folder, call, messages):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "library.py").write_text(LIBRARY)
    (tmp_path / "here").mkdir(exist_ok=True)
    mine = tmp_path / "here" / "mine.py"
    mine.write_text(f"from library import annotated, length\ndef mine(completions, **kwargs):\n    return {call}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / folder), *sys.path])
    monkeypatch.delitem(sys.modules, "library", raising=False)
    assert find(f"{mine}:mine")["mine"][0].messages == messages


def test_a_function_whose_source_is_gone_gets_texts():
    scope = {}
    exec("def f(completions): return [c[0]['content'] for c in completions]", scope)
    assert not reads_messages(scope["f"]) and not reads_messages(print)


SLOW = """
import asyncio, time

async def waits(completions, **_):
    await asyncio.sleep(60)

async def blocks(completions, **_):
    time.sleep(60)

async def raises(completions, **_):
    await asyncio.sleep(0)
    return [1 / 0]

async def ends(completions, **_):
    raise SystemExit(3)

async def cancels(completions, **_):
    raise asyncio.CancelledError

async def is_quick(completions, **_):
    await asyncio.sleep(0.01)
    return [1.0, 2.0]
"""


def test_coroutines_that_fail_are_named_and_the_others_count(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    names = ("waits", "blocks", "raises", "ends", "cancels", "is_quick")
    functions = find(",".join(f"{tmp_path / 'slow.py'}:{name}" for name in names))
    rewards = score(TEXTS, RECORDS, functions=functions, timeout=0.3, on_error="zero")
    assert rewards.by_name["is_quick"] == [1.0, 2.0] and list(rewards.errors) == list(names[:-1])
    late = "took longer than the 0.3 seconds of --reward_timeout"
    assert late in rewards.errors["waits"] and late in rewards.errors["blocks"]
    assert "(slow.py, line 12: return [1 / 0])" in rewards.errors["raises"]
    assert "SystemExit: 3" in rewards.errors["ends"] and "CancelledError" in rewards.errors["cancels"]
    again = score(TEXTS, RECORDS, functions={"is_quick": functions["is_quick"]}, timeout=5)
    assert again.total == [1.0, 2.0]


def test_every_coroutine_that_blocks_ends_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_calls, "GRACE", 0.01)
    (tmp_path / "slow.py").write_text(SLOW)
    blocks, _ = find(f"{tmp_path / 'slow.py'}:blocks")["blocks"]
    rewards = score(TEXTS, RECORDS, functions=dict.fromkeys("ab", (blocks, 1.0)), timeout=0.1, on_error="zero")
    assert list(rewards.errors) == ["a", "b"] and all(
        "took longer than the 0.1" in it for it in rewards.errors.values()
    )


def test_a_task_that_ends_the_event_loop_is_the_functions_error(tmp_path):
    (tmp_path / "tasks.py").write_text(
        "import asyncio, sys\nasync def ends():\n    sys.exit(3)\n"
        "async def f(completions, **_):\n    task = asyncio.create_task(ends())\n    await asyncio.sleep(60)\n"
    )
    with pytest.raises(RewardError, match=r"'f' raised SystemExit: 3 \(tasks\.py, line 3: sys\.exit\(3\)\)"):
        earned(find(f"{tmp_path / 'tasks.py'}:f"))


def test_coroutines_wait_at_the_same_time(tmp_path):
    """Each waits until both have begun: one after the other they would not end."""
    (tmp_path / "meet.py").write_text(
        "import asyncio\nbegun = []\n"
        "async def meet(completions, **_):\n"
        "    begun.append(1)\n    while len(begun) < 2:\n        await asyncio.sleep(0.001)\n    return [1.0, 1.0]\n"
        "async def also(completions, **_):\n    return await meet(completions)\n"
    )
    path = tmp_path / "meet.py"
    assert score(TEXTS, RECORDS, functions=find(f"{path}:meet,{path}:also"), timeout=30).total == [2.0, 2.0]


def test_a_failing_coroutine_is_tried_again_to_find_the_record(tmp_path):
    (tmp_path / "third.py").write_text(
        "async def fails(completions, id, **_):\n    if '2' in id:\n        raise KeyError('2')\n    return [0.0]\n"
    )
    with pytest.raises(RewardError, match="Record 2, completion 'Eleven"):
        earned(find(f"{tmp_path / 'third.py'}:fails"))


def test_tensors_are_rewards(tmp_path):
    torch = pytest.importorskip("torch")
    functions = {
        "whole": (lambda **_: torch.tensor([0.5, 1.0], requires_grad=True), 1.0),
        "parts": (lambda **_: [torch.tensor(1), torch.tensor(True)], 1.0),
    }
    assert earned(functions).by_name == {"whole": [0.5, 1.0], "parts": [1, True]}


MATH = [r"<think>halves</think> \boxed{\frac{1}{2}}", r"<think>thirds</think> \boxed{\frac{1}{3}}"]
TRLS = [  # entry, rewards of the two completions of MATH, of 3 and 25 tokens
    pytest.param("think_format_reward", [1.0, 1.0], marks=pytest.mark.peer("trl")),
    pytest.param("get_repetition_penalty_reward()", [0.0, -22 / 23], marks=pytest.mark.peer("trl")),
    pytest.param("accuracy_reward", [1.0, 0.0], marks=pytest.mark.peer("math_verify")),
    pytest.param("reasoning_accuracy_reward", [1.0, 0.0], marks=pytest.mark.peer("math_verify")),
]


@pytest.mark.parametrize(("entry", "rewards"), TRLS)
def test_trls_own_rewards_run_by_their_import_path(entry, rewards):
    records = [Question(str(i), "?", "", "", columns={"solution": r"$\frac{1}{2}$"}) for i in range(2)]
    functions = find_reward_functions(f"trl.rewards.{entry}", None, ready_made={}, columns=["solution"])
    sampled = Sampled(SAMPLED.prompts, [[1, 2, 3], [7] * 25], SAMPLED.trainer_state)
    (values,) = score(MATH, records, functions=functions, sampled=sampled, timeout=60).by_name.values()
    assert values == pytest.approx(rewards)


FORMULAS = [  # solution, the end of a completion, reward
    (r"$\frac{1}{3}$", r"\boxed{\frac{2}{6}}", 1.0),
    (r"$(x-1)(x+1)$", r"\boxed{x^2-1}", 1.0),
    (r"\frac{1}{3}", r"<answer>\frac{2}{6}</answer>", 1.0),  # without the box it looks everywhere
    (r"\frac{1}{3}", "It is 1/3.", 0.0),  # no LaTeX
    (r"$\sqrt{2}$", r"\boxed{1.41}", 0.0),
    (r"\sqrt{2}", r"\boxed{\sqrt{2}}", None),  # a formula without $ around it may not be found
]


@pytest.mark.peer("math_verify")
@pytest.mark.parametrize(("solution", "text", "reward"), FORMULAS)
def test_formulas_in_records_are_compared_by_trls_accuracy_reward(tmp_path, solution, text, reward):
    path = tmp_path / "formulas.jsonl"
    path.write_text(json.dumps({"prompt": "Which number?", "solution": solution}))
    questions = read_questions(str(path), answers="none").questions
    entry = "trl.rewards.accuracy_reward"
    functions = find_reward_functions(entry, None, ready_made={}, columns=list(questions[0].columns))
    assert score([text], questions, functions=functions, timeout=60).by_name == {"accuracy_reward": [reward]}


def traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Judging:
    def __call__(self, completions, gold, **kwargs): ...

    def method(self, completions, *, gold): ...


def takes_gold(completions, gold, **_): ...
def uses_kwargs(completions, **columns): return columns["gold"]  # fmt: skip


def passes_on(completions, gold, **columns): return uses_kwargs(completions, **columns)  # fmt: skip


def looks_around(completions, gold, **_): return locals()  # fmt: skip


NAMED = {"completions", "gold"}
READ = [  # function, the arguments that it can read, None for any
    (takes_gold, NAMED),
    (functools.partial(takes_gold, strict=True), NAMED),
    (Judging(), NAMED | {"self"}),
    (Judging().method, NAMED | {"self"}),
    (lambda completions, gold, **_: [0.0], NAMED),
    (uses_kwargs, None),
    (passes_on, None),
    (looks_around, None),
    (traced(takes_gold), None),  # the decorator may read others
    (len, None),
]


@pytest.mark.parametrize(("function", "expected"), READ, ids=range(len(READ)))
def test_the_columns_that_a_function_can_read_are_seen(function, expected):
    assert columns_read(function) == expected
