"""Files: one record reads back as the same question from JSON, JSON Lines, CSV and Parquet; bad tables are named."""

import csv
import io
import json
import re
import shlex
import subprocess

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from grpo_ds.errors import MAX_LINES, DataError
from grpo_ds.task import hub_records
from grpo_ds.task.csv_records import Row
from grpo_ds.task.questions import read_questions
from grpo_ds.task.sources import parse_file
from tests.conftest import check_example
from tests.task.test_record_shapes import GSM8K, MEDQA, MMLU, NUMBER, SYSTEM, USER, WORD_PROBLEMS

LABELS = {"labels": ("A", "B", "C", "D")}


def test_the_example_of_a_row_is_right():
    check_example(Row)


def as_json(records):
    return json.dumps(records).encode()


def as_lines(records):
    return "\n".join(map(json.dumps, records)).encode()


def as_csv(records, delimiter=","):
    """A table whose cells hold lists and objects as JSON; a field that is not there is an empty cell."""
    names = list(dict.fromkeys(name for record in records for name in record))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(names)
    for record in records:
        cells = [record.get(name, "") for name in names]
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    return file.getvalue().encode()


def as_parquet(records):
    names = list(dict.fromkeys(name for record in records for name in record))
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{name: it.get(name) for name in names} for it in records]), file)
    return file.getvalue()


WRITERS = {
    "JSON": as_json,
    "JSON Lines": as_lines,
    "CSV": as_csv,
    "CSV with semicolons": lambda records: as_csv(records, ";"),
    "CSV with tabs": lambda records: as_csv(records, "\t"),
    "Parquet": as_parquet,
}


@pytest.fixture(scope="module")
def any_file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "data"


def read(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_questions(str(path), **options).questions


SETS = [  # records, how they are read
    ([GSM8K, {"question": "7 times 6?", "answer": "42", "id": "7"}], NUMBER),
    ([MEDQA, {**MEDQA, "question": "And beriberi?", "answer_idx": "A", "answer": "Vitamin A"}], LABELS),
    ([MMLU, {**MMLU, "question": "3 + 3?", "answer": 2}], LABELS),
    ([{"prompt": "Write a haiku.", "topic": "sea"}, {"prompt": "Write a limerick."}], {"answers": "none"}),
    ([{"prompt": [SYSTEM, USER]}, {"prompt": [USER]}], {"answers": "none"}),
    ([{"question": "Capital?", "answer": ["Rome", "Roma"]}], {"answers": "text"}),
    ([{"question": "Is it?", "context": ["It", "is."], "ground_truth": "yes"}], {}),
    ([{"question": 'A "word",\nand; a\tline?', "context": "a|b", "ground_truth": "no"}], {}),
    ([json.loads(line) for line in WORD_PROBLEMS.read_text().splitlines()], NUMBER),
]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(("records", "options"), SETS)
def test_records_of_each_shape_are_the_same_questions_in_every_form(tmp_path, form, records, options):
    expected = read(tmp_path / "data", as_json(records), **options)
    found = read(tmp_path / "data", WRITERS[form](records), **options)
    assert found == expected and [it.messages for it in found] == [it.messages for it in expected]


WORDS = st.text(st.sampled_from("abcé ,;|\t\n\"'#=?<>\u4e2d"), min_size=1, max_size=12).map(lambda text: f"x{text}x")
OPTIONS = st.lists(WORDS, min_size=2, max_size=4, unique_by=lambda text: text.casefold())
RECORDS = st.fixed_dictionaries(
    {"question": WORDS, "answer": st.integers(-99, 99) | st.sampled_from(["1/3", "0.5", "It is.\n#### 1,000"])},
    optional={"context": WORDS | st.lists(WORDS, min_size=1, max_size=3), "note": WORDS, "id": st.integers(0, 10**6)},
)
CHOICES = st.fixed_dictionaries({"question": WORDS, "options": OPTIONS, "answer": st.sampled_from(["A", "B"])})
CHATS = st.fixed_dictionaries({"messages": WORDS.map(lambda text: [SYSTEM, {"role": "user", "content": text}])})


def of_one_kind(name, value):
    """A Parquet column has one kind of value, and cells of CSV are texts."""
    if name == "context":
        return value if isinstance(value, list) else [value]
    return str(value) if isinstance(value, int) else value


@settings(deadline=None, max_examples=60)  # the cores are shared
@given(
    st.one_of(
        st.tuples(st.lists(RECORDS, min_size=1, max_size=4), st.just(NUMBER)),
        st.tuples(st.lists(CHOICES, min_size=1, max_size=4), st.just(LABELS)),
        st.tuples(st.lists(CHATS, min_size=1, max_size=3), st.just({"answers": "none"})),
    ),
    st.sampled_from(sorted(WRITERS)),
)
def test_any_record_is_the_same_question_in_every_form(any_file, given_records, form):
    records, options = given_records
    records = [{name: of_one_kind(name, value) for name, value in record.items()} for record in records]
    try:
        expected = read(any_file, as_json(records), **options)
    except DataError as error:  # the same record twice
        with pytest.raises(DataError) as other:
            read(any_file, WRITERS[form](records), **options)
        assert len(str(other.value).splitlines()) == len(str(error).splitlines())
        return
    found = read(any_file, WRITERS[form](records), **options)
    assert found == expected and [it.messages for it in found] == [it.messages for it in expected]


FORMS = [
    (as_json([GSM8K]), "a JSON list"),
    (as_lines([GSM8K, GSM8K]), "JSON Lines"),
    (json.dumps({"7": GSM8K}), "a JSON object of records by id"),
    (as_csv([GSM8K]), "CSV with commas"),
    (as_csv([GSM8K], ";"), "CSV with semicolons"),
    (as_csv([GSM8K], "\t"), "CSV with tabs"),
    (as_csv([GSM8K], "|"), "CSV with '|'"),
    ("sep=^\nquestion^answer\nIs it?^yes\n", "CSV with '^'"),
    ("prompt\nWrite a haiku.\n", "CSV with commas"),
    ("\n\nquestion,answer\n\nIs it?,yes\n", "CSV with commas"),
    ("\tquestion\tanswer\n0\tIs it?\tyes\n", "CSV with tabs"),  # row numbers of pandas
    ("Frage;Antwort\nIst es, und wie?;ja\nWar es, und wie?;nein\n", "CSV with semicolons"),  # commas in texts
    (as_parquet([GSM8K]), "Parquet"),
]


@pytest.mark.parametrize(("content", "form"), FORMS)
def test_the_content_says_which_form_a_file_has(content, form):
    assert parse_file("data", content if isinstance(content, bytes) else content.encode()).form == form


def test_a_column_without_a_name_is_left_out_and_an_empty_cell_is_a_missing_field():
    source = parse_file("data.csv", b",question,answer,id\n0,Is it?,yes,\n1,Was it?,no,7\n\n")
    assert source.records == (
        ("line 2", {"question": "Is it?", "answer": "yes"}),
        ("line 3", {"question": "Was it?", "answer": "no", "id": "7"}),
    )


def test_a_context_of_a_table_may_be_long(tmp_path):
    (found,) = read(tmp_path / "data.csv", f"question,context,ground_truth\nIs it?,{'It is. ' * 100_000},yes\n")
    assert len(found.context) == 699_999


HEAD = "question,context,ground_truth\n"
ROW = "Is it?,It is.,yes\n"
BAD = [  # content, options, words of the error
    (
        f"{HEAD}{ROW}Was it?,It was, no\nAnd, now?,It is, still.,no\n",
        {},
        ["line 4: 5 cells, but the first line names 3"],
    ),
    (f"{HEAD}{ROW}Was it?,It was\n", {}, ["line 3: 2 cells, but the first line names 3 columns\n"]),
    (f"{HEAD}{ROW}Was it?,It was,,\n", {}, ["line 3: 4 cells", "a text with commas or line breaks in it stands in do"]),
    (f'{HEAD}{ROW}"Was\nit?",It was,perhaps\n', {}, ["lines 3 to 4: ground_truth is 'perhaps'; it must be yes or no"]),
    (
        f'{HEAD}{ROW}Was it?,"It was,no\n{ROW}',
        {},
        ["lines 3 to 4: a double quote opens a text here, and none closes it"],
    ),
    (f'{HEAD}{ROW}Was it?,"It" was,no\n{ROW}', {}, ["line 3: a text goes on behind its closing double quote"]),
    (f"{HEAD}{ROW}Was it?,,no\n", {}, ["line 3: context is missing"]),
    (f"{HEAD}{ROW}Was it?,It was,\n", {}, ["line 3: ground_truth is missing"]),
    (f"{HEAD}{ROW}{ROW}", {}, ["line 3: same question and context as line 2; remove one"]),
    (
        f"id,{HEAD}1,{ROW}1,Was it?,It was.,no\n",
        {},
        ["line 3: id '1' is taken by line 2, but its answer is 'yes', not"],
    ),
    (
        f"question,{HEAD}{ROW}",
        {},
        ["line 1: column 'question' is there twice", "line 2: 3 cells, but the first line na"],
    ),
    (HEAD, {}, ["has no records"]),
    ('sep=;\n"question;answer\n?;yes\n', {}, ["lines 2 to 3: a double quote opens a text here, and none closes it"]),
    ('sep="\nquestion;answer\n?;yes\n', {}, ["is not valid JSON: line 1, column 1", "Nor is it CSV: the first"]),
    ("question,answer\n6 times 7?,forty\n", NUMBER, ["line 2: answer is 'forty', which is not a number"]),
    (
        "question,options,answer\n?,\"['a', 'b']\",A\n",
        LABELS,
        ["line 2: options is a text, not a list; a table may hold"],
    ),
    ("question,A,B,answer\n?,a,b,E\n", LABELS, ["line 2: answer is 'E', but there are only 2 options, A to B"]),
    (
        "sep=,\nquestion;answer\nIs it?;yes\n",
        {},
        ["Fields here: 'question;answer'", "put a line before it: sep=;"],
    ),
    (
        "frage,x;antwort\nIst es?;ja\nWar es?;nein\n",
        {},
        ["line 2: question is missing", "Fields here: 'frage,x', antwort"],
    ),
    (
        "Is it?,It is.,yes\nWas it?,It was.,no\n",
        {},
        ["question is missing", "Fields here: 'Is it?', 'It is.', yes. Name"],
    ),
    (as_parquet([{"a": 1, "b": [2.5]}]), {}, ["record 1: question is missing", "Fields here: a, b. Name those of"]),
    (as_parquet([{"question": "?", "answer": None}, GSM8K]), NUMBER, ["record 1: answer is missing"]),
    (as_parquet([{"question": 7, "answer": 1}]), NUMBER, ["record 1: question is a number, not a text"]),
    (as_parquet([{"question": b"?", "answer": 1}]), NUMBER, ["record 1: question is bytes, not a text"]),
    (
        as_parquet([GSM8K])[:-9],
        {},
        ["begins like a Parquet table, but it cannot be read: ", "write or download it again"],
    ),
    (as_parquet([])[:8], {}, ["begins like a Parquet table"]),
]


@pytest.mark.parametrize(("content", "options", "expected"), BAD)
def test_a_bad_table_is_named_with_its_place_in_six_lines(tmp_path, content, options, expected):
    with pytest.raises(DataError) as error:
        read(tmp_path / "data.csv", content, **options)
    message = str(error.value)
    assert [part for part in expected if part not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES and max(map(len, message.splitlines())) < 300, message


def test_a_table_of_an_office_program_is_read_by_following_its_errors(tmp_path):
    """Semicolons, Windows-1252, ja and nein: each error holds the command or the flags that come next."""
    path = tmp_path / "meine fragen.csv"
    path.write_bytes("Frage;Antwort\nFällt „es“?;ja\nStieg es, laut Text?;nein\n".encode("cp1252"))
    with pytest.raises(DataError) as error:
        read_questions(str(path))
    assert "byte 0xe4 at offset 15, line 2" in str(error.value) and "Fällt „es" in str(error.value)
    convert = next(line.strip() for line in str(error.value).splitlines() if line.startswith("  iconv"))
    subprocess.run(["bash", "-c", convert], check=True)
    new = shlex.split(convert)[-1]
    with pytest.raises(DataError) as error:
        read_questions(new)
    named = dict(re.findall(r"--(\w+)_field (\w+)", str(error.value)))
    assert named == {"question": "Frage", "label": "Antwort", "context": "none"}
    labels = re.search(r" --labels (\S+)", str(error.value))[1].split(",")
    found = read_questions(new, fields=named, labels=tuple(labels)).questions
    assert [(it.text, it.label) for it in found] == [("Fällt „es“?", "ja"), ("Stieg es, laut Text?", "nein")]


HUB_IDS = [  # --data, what `datasets` is asked for
    ("openai/gsm8k:main@train", ("openai/gsm8k", "main", "train")),
    ("cais/mmlu:all@test", ("cais/mmlu", "all", "test")),
    ("someone/questions@train[:100]", ("someone/questions", None, "train[:100]")),
    ("someone/questions", ("someone/questions", None, "train")),
    ("qiaojin/PubMedQA", ("qiaojin/PubMedQA", "pqa_labeled", "train")),
    ("qiaojin/PubMedQA:pqa_artificial", ("qiaojin/PubMedQA", "pqa_artificial", "train")),
]


@pytest.mark.parametrize(("data", "asked"), HUB_IDS)
def test_a_hub_id_may_name_its_config_and_its_split(monkeypatch, data, asked):
    import datasets

    calls = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = lambda name, config, split: calls.append((name, config, split)) or [GSM8K]  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_questions(data, answers="number")
    assert calls == [asked] and found.source.startswith(data) and hub_records.hub_id(data) == asked[0]
    assert f"split {asked[2]}; question 'question'" in found.form


@pytest.mark.parametrize("data", ["a/b:", "a/b@", "a/b:c:d", "a/b c", "a/b.csv:main", "a/b/c@train"])
def test_what_only_looks_like_a_hub_id_is_a_missing_file(data):
    with pytest.raises(DataError, match="There is no data file"):
        read_questions(data)
