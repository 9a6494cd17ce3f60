"""Data as strangers bring it: what each kind of it is told, and that the flags of an error read it."""

import io
import json
import shlex
from dataclasses import dataclass

import pyarrow as pa
import pytest
from pyarrow import parquet

from grpo_ds.errors import MAX_LINES, DataError
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import AskConfig
from grpo_ds.settings.data_flags import DataFlags
from grpo_ds.task.questions import read_questions


@dataclass(frozen=True, kw_only=True)
class Flagged(DataFlags, AskConfig):
    """The flags that say how records are read."""


NUMBER, TEXT, NONE, LETTERS = "--answers number", "--answers text", "--answers none", "--labels A,B,C,D"
USER, ASSISTANT = {"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}
GOOD_SUM, GOOD_CHOICE = (
    {"question": "6 times 7?", "answer": "42"},
    {"question": "Which?", "options": ["x", "y", "z", "w"], "answer": "A"},
)


def lines(*records):
    return "\n".join(json.dumps(record) for record in records)


def table(**columns):
    """A Parquet file."""
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def sums(*answers):
    return lines(*({"question": f"{number}?", "answer": answer} for number, answer in enumerate(answers)))


def choices(options, answer):
    return lines({"question": "Or?", "options": options, "answer": answer}, GOOD_CHOICE)


def read(path, content, flags):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_questions(str(path), **parse(Flagged, shlex.split(flags), about="").config().reading)


BAD = [  # content, flags, words of the error
    # numbers
    (sums("about 7", "8", "9"), NUMBER, ["line 1: answer is 'about 7', which is not a number", 'Records: {"question"']),
    (sums(None, 8), NUMBER, ["line 1: answer is null, not a number"]),
    (sums({"value": 7}, 8), NUMBER, ["line 1: answer is an object, not a number"]),
    (sums(float("inf"), 8), NUMBER, ["line 1: answer is infinity, not a number"]),
    ('{"question": "?", "answer": %s}\n' % ("9" * 5000) + lines(GOOD_SUM), NUMBER, ["line 1: answer is infinity, not"]),
    ('{"question": "?", "answer": %s,}\n[' % ("9" * 5000), NUMBER, ["line 1: broken JSON"]),
    (sums("1.234,5", 8), NUMBER, ["answer is '1.234,5', which is not a number; if 1,234.5 is meant, write that"]),
    (sums("12,50", 8), NUMBER, ["answer is '12,50', which is not a number; if 12.50 is meant, write that"]),
    (sums("It is #### 42", 8), NUMBER, ["which is not a number; #### must begin its last line"]),
    (sums("#### 42\nReally.", 8), NUMBER, ["which is not a number; #### must begin its last line"]),
    (sums(r"\boxed{42}", r"\boxed{7}"), NUMBER, [r"line 1: answer is '\\boxed{42}', which is not a number", "GSM8K"]),
    # texts
    (sums("...", "Paris"), TEXT, ["line 1: answer is '...', which holds no word, so that no answer could be equal"]),
    (sums(["Paris", "!"], "Rome"), TEXT, ["line 1: answer is '!', which holds no word"]),
    (sums([], ["Paris"]), TEXT, ["line 1: answer is an empty list"]),
    # options
    (choices(["x", "y"], "D"), LETTERS, ["line 1: answer is 'D', but there are only 2 options, A to B"]),
    (choices(["x", "x", "y"], "x"), LETTERS, ["answer is 'x', the text of options A and B; give the letter"]),
    (choices(list("vwxyz"), "E"), LETTERS, ["answer is 'E'; it must be A or B or C or D", "--labels"]),
    (choices([], "A"), LETTERS, ["line 1: options holds no option"]),
    (choices([{"key": "A"}, {"key": "B"}], "A"), LETTERS, ["line 1: options[A] is an object, not a text"]),
    (lines({"question": "Or?", "options": ["x", "y"]}, GOOD_CHOICE), LETTERS, ["line 1: answer is missing"]),
    # chats
    (lines({"messages": [USER, ASSISTANT]}), NONE, ["messages ends with the turn of the assistant; the last must be"]),
    (lines({"messages": json.dumps([USER, ASSISTANT])}), NONE, ["messages ends with the turn of the assistant"]),
    (lines({"messages": [{"from": "human", "value": "Go."}]}), NONE, ["messages has null as role in turn 1; roles"]),
    # fields
    (lines({"question": "Or?"}, {"question": "And?"}), NUMBER, ["answer is missing", 'Records: {"question": "..."']),
    (lines({"prompt": "Go."}, {"prompt": "Run."}), "", ["ground_truth is missing", "or --answers none if rewards"]),
    (lines(GOOD_SUM), f"{NUMBER} --label_field sum", ["sum is missing", "Fields here: question, answer; try --label"]),
    # files
    (b"", NUMBER, ["is empty", '"answer": "42"']),
    (b"\xef\xbb\xbf \n", NONE, ["is empty", '{"prompt": "..."}']),
    ("null", TEXT, ["holds null, not records", "a list of accepted texts"]),
    ("question^answer\n1?^1\n", NUMBER, ["line 1, column 1", "Nor is it CSV", "what sep=^ before", '"answer": "42"']),
    ("Count to 3.\nCount to 4.\n", NONE, ["Nor is it CSV: the first line names the columns", '{"prompt": "..."}']),
    ('[{"question": "?", "answer": 1},]', NUMBER, ["is not valid JSON: line 1, column 3", "\nFix it there. Records: "]),
    (json.dumps({"train": [GOOD_SUM]}), NUMBER, ["('train') is a list", "Save the list of records alone, without"]),
    ("How many?,1\nHow much?,2\n", NUMBER, ["Fields here: 'How many?', 1. Name", "The first line names the columns."]),
    ("question,answer\n1?,1\n2?\n", NUMBER, ["line 3: 1 cell, but the first line names 2 columns", "sep=;"]),
    ("question;answer\n1?;1\n2?;3;4\n", NUMBER, ["line 3: 3 cells, but the first line", "semicolons do", "sep=,"]),
    ("question,answer\n1?,1\n2?,two\n3?,3\n", NUMBER, ["line 3: answer is 'two'", "\nRecords: {"]),
    ("Frage;Antwort\n1?;1\n", NUMBER, ["--question_field Frage --label_field Antwort --context_field none"]),
    ("question,answer\n1?,1\n".encode("utf-16"), NUMBER, ["it begins like text in UTF-16", "iconv -f UTF-16 -t UTF-8"]),
    ("question,answer\nWie groß?,1\n".encode("cp1252"), NUMBER, ["byte 0xdf at offset 23, line 2", "iconv -f CP1252"]),
    # Parquet
    (table(text=["a"], score=[1.5]), NUMBER, ["record 1: question is missing", "Fields here: text, score. Name those"]),
    (table(question=[{"stem": "1?"}], answer=["1"]), NUMBER, ["record 1: question is an object, not a text"]),
    (table(question=["1?", "2?"], answer=["1", None]), NUMBER, ["record 2: answer is missing"]),
    (table(question=["1?"], answer=pa.array([None], pa.null())), NUMBER, ["record 1: answer is missing"]),
    (table(question=["1?", "2?"], answer=[1.5, float("nan")]), NUMBER, ["answer is NaN (a missing value), not a num"]),
    (table(question=["1?"], answer=pa.array([1], pa.date32())), NUMBER, ["record 1: answer is date, not a number"]),
    (table(question=pa.array([], pa.string())), NUMBER, ["has no records"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "flags", "expected"), BAD)
def test_bad_data_is_told_what_where_and_what_to_do_in_six_lines(tmp_path, content, flags, expected):
    with pytest.raises(DataError) as error:
        read(tmp_path / "data", content, flags)
    message = str(error.value)
    assert [part for part in expected if part not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES and max(map(len, message.splitlines())) < 400, message


ARC = {"question": "Or?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
FOLLOWED = [  # content, flags, the flags that the error names
    (sums("$18", "$3", "4", "$-5"), NUMBER, "--units '$'"),
    (sums("18 dollars", "3 km"), NUMBER, "--units dollars,km"),
    (lines(*({"question": f"{n}?", "passage": "p", "answer": n < 3} for n in range(6))), "", "--labels false,true"),
    (lines(ARC), LETTERS, "--label_field answerKey"),
    (lines({"Question": "1?", "Answer": 1}), NUMBER, "--question_field Question --label_field Answer"),
    (lines({"question": "1?", "solution": "Paris"}), TEXT, "--label_field solution"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "flags", "named"), FOLLOWED)
def test_the_flags_that_an_error_names_read_the_data(tmp_path, content, flags, named):
    with pytest.raises(DataError) as error:
        read(tmp_path / "data", content, flags)
    assert f"try {named}" in str(error.value).replace("Try", "try")
    count = len(content.splitlines())
    boolq = " --context_field passage" * ("passage" in content)  # what the next error would say
    assert len(read(tmp_path / "data", content, f"{flags} {named}{boolq}").questions) == count


OTHER_FORMS = [  # content, flags, question, right answer
    (lines(ARC), f"{LETTERS} --label_field answerKey", "Or?\nA. x\nB. y", "B"),
    (lines({**GOOD_CHOICE, "answer": "c"}), LETTERS, "Which?\nA. x\nB. y\nC. z\nD. w", "C"),
    (choices({"a": "x", "b": "y"}, "b").splitlines()[0], LETTERS, "Or?\na. x\nb. y", "B"),
    (lines({"messages": json.dumps([USER])}), NONE, "Go.", ""),
    (lines({"prompt": '[{"sum": 1}]'}), NONE, '[{"sum": 1}]', ""),  # JSON, but no chat
    (table(question=["Or?"], options=[json.dumps(["x", "y"])], answer=["B"]), LETTERS, "Or?\nA. x\nB. y", "B"),
    (
        table(
            question=["Or?"],
            options=pa.array([[("A", "x"), ("B", "y")]], pa.map_(pa.string(), pa.string())),
            answer=["B"],
        ),
        LETTERS, "Or?\nA. x\nB. y", "B",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "flags", "text", "label"), OTHER_FORMS)
def test_another_form_of_the_same_thing_is_read(tmp_path, content, flags, text, label):
    (question,) = read(tmp_path / "data", content, flags).questions
    assert (question.text, question.label) == (text, label)
    assert bool(question.messages) == ("role" in str(content))


def test_options_that_are_only_a_text_are_said_to_be_left_out(tmp_path):
    found = read(tmp_path / "data", lines({**GOOD_CHOICE, "options": "a) x b) y"}), LETTERS)
    assert found.form.endswith("options 'options' left out, answer 'answer'")
    assert "left out" not in read(tmp_path / "data", lines(GOOD_CHOICE), LETTERS).form
