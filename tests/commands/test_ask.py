"""`ask`: one question, a file of them, questions typed at a terminal; answers that a pipe can read."""

import io
import json
import os
import pty
import readline
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_ds.commands import ask
from grpo_ds.commands.ask import QuestionConfig, opened
from grpo_ds.commands.evaluate import ROWS_AT_ONCE
from grpo_ds.errors import MAX_LINES, DataError, GrpoError
from grpo_ds.run_folder.trained_on import write_trained_on
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question, fingerprint, unanswered_questions
from grpo_ds.terminal import CONTROL_CHARS
from tests.conftest import CHATML

ROOT = Path(__file__).resolve().parents[2]
ASKED = ["--question", "Does it help?", "--context", "It helped 9 of 10."]
BARE = {"question": "Is it?", "context": "It is."}
RECORDS = [
    {
        "id": f"q{n}",
        "question": f"Did {n} of {2 * n} recover?",
        "context": f"Of {2 * n} patients, {n} did." * (n % 3 + 1),
    }
    for n in range(1, ROWS_AT_ONCE + 4)
]
QUIZ = TrainConfig(
    labels="A,B,C,D", question_field="stem", context_field="none", label_field="key", answer_tag="choice",
    reasoning_tag="think", prefill=True, max_completion_length=6,
)  # fmt: skip


def lines(records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


@pytest.fixture
def file(tmp_path):
    """Function that writes records as JSON lines, or a text unchanged, and returns the file."""

    def write(content, name="questions.jsonl"):
        (tmp_path / name).write_text(content if isinstance(content, str) else lines(content))
        return str(tmp_path / name)

    return write


# Errors before a model is loaded.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["--question is empty", "--context is empty", "--file FILE"]),
        (["--question", "Is it?"], ["--context is empty"]),
        (["--context", "It is."], ["--question is empty"]),
        ([*ASKED, "--file", "x.json"], ["question and file exclude each other", "records hold their own"]),
        (["--question", "Is it?", "--interactive"], ["question and interactive exclude each other"]),
        (["--file", "nowhere.json"], [f"--file {Path.cwd()}/nowhere.json cannot be read: No such file"]),
        (["--file", "."], [f"--file {Path.cwd()} cannot be read: Is a directory"]),
    ],
)
def test_what_cannot_be_asked_is_reported_before_a_model_is_loaded(monkeypatch, words, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # not a terminal
    with pytest.raises(GrpoError) as caught:
        ask.main(["--model", "nowhere", *words])
    message = str(caught.value)
    assert all(word in message for word in said) and len(message.splitlines()) <= MAX_LINES, message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([BARE, {"question": "Was it?"}], ["line 2: context is missing", "Labels may be missing"]),
        ([BARE, {**BARE, "question": " "}], ["line 2: question is empty"]),
        ([{**BARE, "ground_truth": "perhaps"}], ["record 1: ground_truth is 'perhaps'"]),
        ([{"id": "1", **BARE}, {"id": "1", "question": "Was it?", "context": "No."}], ["line 2: id '1' is taken"]),
        ("[{", ["is not valid JSON: line 1"]),
        ("", ["is empty"]),
        ("[]", ["has no records"]),
    ],
)
def test_a_bad_record_is_named_with_number_and_field_before_a_model_is_loaded(file, content, said):
    with pytest.raises(DataError) as caught:
        ask.main(["--model", "nowhere", "--file", file(content)])
    message = str(caught.value)
    assert all(word in message for word in said) and len(message.splitlines()) <= MAX_LINES, message


def test_a_label_is_optional_and_is_read_if_present(file):
    records = [
        BARE,
        {**BARE, "context": "No.", "ground_truth": "NO"},
        {**BARE, "context": "?", "final_decision": "maybe"},
    ]
    found = unanswered_questions(opened(file(records)))
    assert [question.label for question in found] == ["", "no", "maybe"]  # and none is left out


@pytest.mark.parametrize("content", [json.dumps([BARE]), lines([BARE]), json.dumps(BARE), json.dumps({"7": BARE})])
def test_a_file_may_have_every_form_of_a_data_file(file, content):
    (found,) = unanswered_questions(opened(file(content)))
    assert (found.text, found.context, found.label) == ("Is it?", "It is.", "")


def test_a_file_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["bash", "-c", f"echo '{json.dumps(BARE)}' > {tmp_path / 'pipe'}"]):
        assert len(unanswered_questions(opened(str(tmp_path / "pipe")))) == 1


@pytest.mark.parametrize("text", ["null", "123", "yes: no", "- one\n- two", "{a}", "'quoted'", "#1?"])
def test_a_question_stays_text_even_if_it_is_valid_yaml(text):
    config = ask.parse(QuestionConfig, ["--question", text, "--context", text], about="").config()
    assert (config.question, config.context) == (text, text)


# Printed answers.


def answered(text, *, label=""):
    form = AnswerFormat()
    return ask.answered(Question("7", "Is it?", "It is.", label), text, form, None)


@pytest.mark.parametrize(
    ("text", "label", "answer", "right"),
    [
        ("<reasoning>So.</reasoning><answer>yes</answer>", "yes", "yes", True),
        ("<reasoning>So.</reasoning><answer>yes</answer>", "no", "yes", False),
        ("<reasoning>So.</reasoning> yes", "yes", None, False),  # not in the required form
    ],
)
def test_an_answer_to_a_labelled_question_says_whether_it_is_right(text, label, answer, right):
    found = json.loads(answered(text, label=label).as_json())
    assert found.pop("broken_rule", None) == (None if answer else "no <answer>")
    assert found == {
        "id": "7", "question": "Is it?", "reasoning": "So.", "answer": answer, "text": text,
        "label": label, "right": right,
    }  # fmt: skip
    assert f"(the label: {label})" in answered(text, label=label).as_text()


@pytest.mark.parametrize(
    ("text", "cut", "rule"),
    [
        ("<reasoning>So.</reasoning><answer>perhaps</answer>", False, "an answer that is not yes or no"),
        ("<reasoning>your reasons</reasoning><answer>yes</answer>", False, "the prompt's placeholder copied"),
        ("<reasoning>So", True, "cut at --max_completion_length"),
    ],
)
def test_an_answer_out_of_form_says_which_rule_it_breaks(text, cut, rule):
    found = ask.answered(Question("7", "Is it?", "", ""), text, AnswerFormat(), None, cut=cut)
    assert f"Answer: none in the required form ({rule})" in found.as_text()
    assert ("; the model wrote" in found.as_text()) == ("</reasoning>" in text)  # what stands behind the reasoning
    assert json.loads(found.as_json())["broken_rule"] == rule


def test_a_text_without_a_form_says_that_it_was_cut():
    form = AnswerFormat(kind="none")
    found = ask.answered(Question("7", "Write.", "", ""), "Once upon", form, None, cut=True)
    assert found.as_text() == "Answer: Once upon (cut at --max_completion_length)"


def test_without_a_label_nothing_is_called_right():
    found = json.loads(answered("<reasoning>So.</reasoning><answer>yes</answer>").as_json())
    assert list(found) == ["id", "question", "reasoning", "answer", "text"]
    assert answered("<reasoning>So.</reasoning><answer>yes</answer>").as_text() == "Reasoning: So.\nAnswer: yes"


@pytest.mark.parametrize(
    "nasty", ["\x1b[31mred", "\x9b2J", "a\rb", "\x7f", "\u202eevil", "\ud800", "one\ntwo", "\u2028"]
)
def test_no_answer_controls_the_terminal_and_json_keeps_the_complete_text(nasty):
    found = answered(f"<reasoning>{nasty}</reasoning>{nasty}")
    assert not CONTROL_CHARS.search(found.as_text() + found.as_json())
    assert found.as_json().isascii() and len(found.as_json().splitlines()) == 1
    assert json.loads(found.as_json())["text"] == found.text


def stub(monkeypatch, capsys):
    """Replace the model by one that answers yes; return what was on the screen each time it was asked."""
    from grpo_ds.training import evaluate

    seen = []

    def sampler(prompts, **_):
        seen.append(capsys.readouterr().out)
        return SimpleNamespace(ended=torch.ones(len(prompts), dtype=torch.bool))

    sampler.tokenizer = None
    texts = lambda _, found: ["<reasoning>So.</reasoning><answer>yes</answer>"] * len(found.ended)  # noqa: E731
    style = SimpleNamespace(answer_format=AnswerFormat(), encode=lambda _, questions: questions, texts=texts)
    monkeypatch.setattr(evaluate, "load_for_asking", lambda *_, **__: (sampler, style))
    return seen


def test_answers_are_printed_batch_by_batch_in_the_order_of_the_file(monkeypatch, capsys, file):
    seen = stub(monkeypatch, capsys)
    ask.main(["--model", "nowhere", "--file", file(RECORDS), "--json"])
    before, between, after = *seen, capsys.readouterr().out
    assert before == "" and len(between.splitlines()) == ROWS_AT_ONCE
    ids = [json.loads(line)["id"] for line in (between + after).splitlines()]
    assert ids == [record["id"] for record in RECORDS]


def test_a_files_answers_come_with_their_questions(monkeypatch, capsys, file):
    stub(monkeypatch, capsys)
    ask.main(["--model", "nowhere", "--file", file([{**BARE, "id": "1", "question": "Is\x0bit?"}, RECORDS[0]])])
    one, two = capsys.readouterr().out.strip().split("\n\n")
    assert one == "1: Is\\x0bit?\nReasoning: So.\nAnswer: yes"
    assert two.startswith(f"q1: {RECORDS[0]['question']}\n")


def test_a_question_that_the_model_was_trained_on_is_marked(monkeypatch, capsys, file, tmp_path):
    stub(monkeypatch, capsys)
    write_trained_on(tmp_path, {fingerprint(Question("", RECORDS[0]["question"], RECORDS[0]["context"], ""))})
    words = ["--model", str(tmp_path), "--file", file(RECORDS[:2])]
    ask.main([*words, "--json"])
    assert [json.loads(line)["trained_on"] for line in capsys.readouterr().out.splitlines()] == [True, False]
    ask.main(words)
    assert capsys.readouterr().out.count("Answer: yes (the model was trained on this question)\n") == 1


# With the tiny model, whose answers are nonsense.


def run(*words, model, stdin=""):
    command = [sys.executable, "launch/ask.py", "--model", str(model), "--max_completion_length", "6", *words]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def quizzed(tiny_folder, tmp_path_factory):
    """The tiny model as saved by a run on A, B, C, D without contexts."""
    folder = tmp_path_factory.mktemp("quizzed") / "checkpoint-2"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).symlink_to(file)
    write_config(QUIZ, folder)
    return folder


def test_questions_of_a_file_get_the_answers_they_get_one_by_one(tiny_folder, file, capsys, monkeypatch):
    monkeypatch.setattr(ask, "gpu_memory_gib", lambda: None)
    monkeypatch.setattr(
        "grpo_ds.system.hardware.cpu_has_bf16", lambda: False
    )  # in fp32 no two tokens are equally likely
    model = ["--model", str(tiny_folder), "--max_completion_length", "6", "--json"]
    ask.main([*model, "--file", file(RECORDS)])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in found] == [record["id"] for record in RECORDS]
    for record, line in [*zip(RECORDS, found, strict=True)][:: ROWS_AT_ONCE // 2]:
        ask.main([*model, "--question", record["question"], "--context", record["context"]])
        assert json.loads(capsys.readouterr().out) == {**line, "id": "asked"}


def test_progress_of_a_file_is_not_among_its_answers(tiny_folder, file, capsys, monkeypatch):
    monkeypatch.setattr("grpo_ds.report.long_work.SILENCE", 0)  # a line after every token
    words = ["--model", str(tiny_folder), "--max_completion_length", "4", "--file", file(RECORDS), "--json"]
    ask.main(words)
    printed = capsys.readouterr()
    assert len([json.loads(line) for line in printed.out.splitlines()]) == len(RECORDS)
    lines = [line for line in printed.err.splitlines() if line.startswith("Answers: ")]
    assert lines[0] == f"Answers: {len(RECORDS)} questions to do"
    assert lines[-1].startswith(f"Answers: {len(RECORDS)} of {len(RECORDS)} questions, ")  # of two batches
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)  # there the answers themselves show it
    ask.main(words)
    assert "Answers: " not in capsys.readouterr().err


def test_a_checkpoint_brings_its_labels_tags_fields_and_prompt(quizzed, file, capsys):
    quiz = [{"stem": f"What is {n} + {n}?", "key": "abcd"[n], "id": n} for n in range(4)]
    ask.main(["--model", str(quizzed), "--json", "--file", file(quiz)])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["id"], line["question"], line["label"]) for line in found] == [
        (str(n), f"What is {n} + {n}?", "ABCD"[n]) for n in range(4)
    ]
    assert all(line["text"].startswith("<think>") and not line["right"] for line in found)
    with pytest.raises(DataError, match="key is 'E'; it must be A or B or C or D"):
        ask.main(["--model", str(quizzed), "--file", file([{"stem": "Which?", "key": "E"}])])


def test_a_tag_that_the_chat_template_opens_is_a_part_of_the_answer_once(quizzed, tmp_path, capsys):
    for file in quizzed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    ask.main(["--model", str(tmp_path), "--json", "--question", "Which?"])  # it was trained with --prefill
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["text"].startswith("<think>\n") and found["text"].count("<think>") == 1


def test_standard_output_is_json_and_nothing_else(tiny_folder):
    result = run("--file", "-", "--json", model=tiny_folder, stdin=lines(RECORDS[:2]))
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["q1", "q2"]


def test_a_reader_that_has_ended_ends_it_quietly_as_other_programs(tiny_folder, file):
    words = [sys.executable, "launch/ask.py", "--model", str(tiny_folder), "--max_completion_length", "2", "--json"]
    command = '"$@" | true; echo "${PIPESTATUS[0]}"'
    result = subprocess.run(
        ["bash", "-c", command, "bash", *words, "--file", file(RECORDS)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.stdout == "141\n" and "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_a_question_that_is_too_long_is_reported_before_any_is_answered(tiny_folder, file, capsys):
    long = {"id": "long", "question": "Is it " * 200 + "?", "context": "It is."}
    with pytest.raises(DataError, match="Question long needs"):
        ask.main(["--model", str(tiny_folder), "--file", file([*RECORDS, long])])
    assert capsys.readouterr().out == ""


# At a terminal.


class Terminal:
    """Python in its own terminal, which receives Ctrl-C and Ctrl-D as from a keyboard."""

    def __init__(self, *words: str) -> None:
        self.seen, self.ended = "", False
        self.pid, self.keys = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts tests in the background ignores it
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, *words], {**os.environ, "TERM": "xterm", "PYTHONPATH": "."})

    def waits_at(self, prompt: str) -> str:
        """Output since the last prompt."""
        self._read_until(lambda: prompt in self.seen)
        shown, found, self.seen = self.seen.partition(prompt)
        assert found or not prompt, shown
        return shown

    def types(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def interrupts(self) -> None:
        """Press Ctrl-C, twice if the first fell between two checks of Python's, which then waits for a key."""
        self.types("\x03")
        if not self._read_until(lambda: False, seconds=20):
            self.types("\x03")

    def ends(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the last output."""
        assert self._read_until(lambda: False), self.seen
        self.ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.seen

    def _read_until(self, enough: Callable[[], bool], seconds: float = 120) -> bool:
        """Read until `enough`; return True if no process has the terminal open any more."""
        deadline = time.monotonic() + seconds
        while not enough() and (left := deadline - time.monotonic()) > 0:
            if not select.select([self.keys], [], [], left)[0]:
                break
            try:
                piece = os.read(self.keys, 4096)
            except OSError:
                piece = b""
            if not piece:
                return True
            self.seen += piece.decode(errors="replace")
        return False

    def close(self) -> None:
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.keys)


@pytest.fixture
def terminal():
    opened = []

    def open_one(*words):
        opened.append(Terminal(*map(str, words)))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


CONVERSATION = """
from grpo_ds.commands.ask import QuestionConfig, converse
converse(lambda question: print("arrived:", len(question.text), repr(question.context)), QuestionConfig())
"""


def test_a_line_may_be_longer_than_a_terminals_limit(terminal):
    keyboard = terminal("-c", CONVERSATION)
    keyboard.waits_at("Question: ")
    keyboard.types("x" * 5000 + "\n")  # the limit is 4096
    keyboard.waits_at("Context: ")
    keyboard.types("It is.\n\n")
    assert "arrived: 5000 'It is.'" in keyboard.waits_at("Question: ")


@pytest.mark.skipif(
    "libedit" in (readline.__doc__ or ""), reason="this Python edits lines by libedit: no marked pastes"
)
def test_a_paste_may_hold_empty_lines(terminal):
    keyboard = terminal("-c", CONVERSATION)
    keyboard.waits_at("Question: ")
    keyboard.types("Did 9?\n")
    keyboard.waits_at("Context: ")
    keyboard.types("\x1b[200~Of 20 patients,\n\n9 did.\x1b[201~\n")  # as terminals mark a paste
    keyboard.waits_at("Context: ")
    keyboard.types("\n")
    assert "arrived: 6 'Of 20 patients,\\n\\n9 did.'" in keyboard.waits_at("Question: ")


def test_questions_are_typed_one_after_another_until_ctrl_d(tiny_folder, terminal):
    keyboard = terminal("launch/ask.py", "--model", tiny_folder, "--max_completion_length", "6")
    assert "An empty line ends a context" in keyboard.waits_at("Question: ")
    for _ in range(2):
        keyboard.types("Does it help?\n")
        keyboard.waits_at("Context: ")
        keyboard.types("It helped\n")
        keyboard.waits_at("Context: ")
        keyboard.types("9 of 10.\n")
        keyboard.waits_at("Context: ")
        keyboard.types("\n")
        shown = keyboard.waits_at("Question: ")
        _, _, said = shown.partition("Reasoning:")  # the text before it is readline's
        said, _, _ = said.replace("\r\n", "\n").rpartition("\n")
        assert "Answer:" in said and not CONTROL_CHARS.search(said)
    keyboard.types("Is it?\n")
    keyboard.waits_at("Context: ")
    keyboard.types("\x04")  # ends an empty context
    assert "The context is empty" in keyboard.waits_at("Question: ")
    keyboard.types("Is it " * 150 + "?\n")  # more than --max_prompt_length
    keyboard.waits_at("Context: ")
    keyboard.types("It is.\n\n")
    assert "raise --max_prompt_length" in keyboard.waits_at("Question: ")
    keyboard.types("\x04")
    code, last = keyboard.ends()
    assert code == 0 and "Traceback" not in last


def test_an_empty_question_quits_and_a_model_without_contexts_asks_for_none(quizzed, terminal):
    keyboard = terminal("launch/ask.py", "--model", quizzed)
    assert "ends a context" not in keyboard.waits_at("Question: ")
    keyboard.types("What is 1 + 1?\n")
    assert "Answer:" in keyboard.waits_at("Question: ")
    keyboard.types("\n")
    assert keyboard.ends()[0] == 0


def test_ctrl_c_ends_cleanly(tiny_folder, terminal):
    keyboard = terminal("launch/ask.py", "--model", tiny_folder)
    keyboard.waits_at("Question: ")
    keyboard.types("Does it")
    keyboard.waits_at("Does it")  # wait for the echo: Ctrl-C drops unread keys, and readline would wait for them
    keyboard.interrupts()
    code, last = keyboard.ends()
    assert code == 130 and "Interrupted." in last and "Traceback" not in last


def test_prompts_stay_out_of_a_pipe_that_takes_the_answers(tiny_folder):
    typed = "Does it help?\nIt helped.\n\n"
    result = run("--interactive", "--json", model=tiny_folder, stdin=typed)
    assert result.returncode == 0 and "Question: " in result.stderr, result.stderr
    assert json.loads(result.stdout)["question"] == "Does it help?"


def test_a_folder_without_our_settings_is_said_to_get_our_prompt(tiny_folder, tmp_path, capsys):
    ask.main(["--model", str(tiny_folder), *ASKED, "--max_completion_length", "2"])
    assert f"{tiny_folder} has no grpo_config.yaml, so the prompt that it was trained with is not known" in (
        capsys.readouterr().err
    )
    shutil.copytree(tiny_folder, tmp_path / "run")
    write_config(TrainConfig(max_completion_length=2), tmp_path / "run")
    ask.main(["--model", str(tmp_path / "run"), *ASKED])
    assert "grpo_config.yaml" not in capsys.readouterr().err
