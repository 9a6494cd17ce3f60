"""Reading data: every accepted form, and a table of bad input with the words that its error must hold."""

import json
import urllib.error

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.errors import MAX_LINES, DataError
from grpo_ds.system import hub
from grpo_ds.task.questions import Question, read_questions
from grpo_ds.task.record_checks import check_record
from grpo_ds.task.record_shapes import REQUIRED_NAMES
from grpo_ds.task.records import BROKEN
from grpo_ds.task.sources import GOLDEN_FILE, Source, rows_to_source

GOOD = {"id": "1", "question": "Is it?", "context": "It is.", "ground_truth": "yes"}
OTHER = {"id": "2", "question": "Was it?", "context": "It was not.", "ground_truth": "no"}
ORIGINAL = {"QUESTION": "Is it?", "CONTEXTS": ["It", "is."], "LABELS": ["A", "B"], "final_decision": "yes"}
HUB_ROW = {"pubid": 7, "question": "Is it?", "context": {"contexts": ["It", "is."]}, "final_decision": "maybe"}


def but(record=GOOD, **changes):
    return {**record, **changes}


def without(field, record=GOOD):
    return {name: value for name, value in record.items() if name != field}


@pytest.fixture
def read(tmp_path):
    def write_and_read(content, **options):
        path = tmp_path / "data.json"
        as_text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(as_text if isinstance(as_text, bytes) else as_text.encode())
        return read_questions(str(path), **options)

    return write_and_read


def lines(*records):
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)


FORMS = [
    ([GOOD, OTHER], "a list"),
    (lines(GOOD, OTHER), "lines"),
    (lines(GOOD, "", OTHER, ""), "lines with blank ones between"),
    (lines(GOOD, OTHER).replace("\n", "\r\n"), "lines from Windows"),
    ("\ufeff" + json.dumps([GOOD, OTHER]), "a byte order mark"),
    ("\ufeff" + lines(GOOD, OTHER), "a byte order mark before lines"),
    (json.dumps([GOOD, OTHER], indent=2), "indented"),
    ([but(ground_truth=" YES\n"), but(OTHER, ground_truth="No")], "labels in any case"),
    ([but(question=" Is it? "), OTHER], "white space around a text"),
    ([but(id=1), but(OTHER, id=2)], "numbers as ids"),
    ([but(exp="no", year=float("nan")), OTHER], "unused fields may hold anything"),
]


@pytest.mark.parametrize(("content", "form"), FORMS)
def test_the_same_two_questions_in_every_form(read, content, form):
    expected = (Question("1", "Is it?", "It is.", "yes"), Question("2", "Was it?", "It was not.", "no"))
    assert read(content).questions == expected, form


def test_pubmedqas_own_form_takes_ids_from_its_keys_and_joins_its_paragraphs(read):
    assert read({"10": ORIGINAL}).questions == (Question("10", "Is it?", "It\nis.", "yes"),)


def test_a_context_may_be_a_list_of_paragraphs(read):
    assert read([but(context=["It", "is."])]).questions[0].context == "It\nis."


def test_a_file_may_hold_a_single_record(read):
    assert len(read(GOOD).questions) == 1


def test_a_line_separator_within_a_text_does_not_end_the_record(read):
    assert (
        len(read(json.dumps(but(context="It\u2028is."), ensure_ascii=False) + "\n" + json.dumps(OTHER)).questions) == 2
    )


def test_a_missing_id_is_made_from_the_text(read):
    first, second = read([without("id"), without("id", OTHER)]).questions
    assert first.id != second.id
    assert read([without("id", OTHER), without("id")]).questions == (second, first)


def test_rows_of_the_hub_are_read_like_other_records(monkeypatch):
    monkeypatch.setattr("grpo_ds.task.questions.open_source", lambda data, _: rows_to_source(data, [HUB_ROW]))
    read = read_questions("qiaojin/PubMedQA", labels=("yes", "no", "maybe"))
    assert read.questions == (Question("7", "Is it?", "It\nis.", "maybe"),)


def test_maybe_is_left_out_and_counted(read):
    result = read([GOOD, but(OTHER, ground_truth="maybe")])
    assert (len(result.questions), result.left_out) == (1, {"maybe": 1})
    assert result.source.endswith("data.json: 1 question (1 yes, 0 no, 1 maybe left out)")


def test_the_default_is_the_golden_file_if_it_exists_and_else_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_questions(None) == read_questions("sample")
    (tmp_path / GOLDEN_FILE).write_text(json.dumps([GOOD]))
    assert read_questions(None).source == f"{tmp_path / GOLDEN_FILE}: 1 question (1 yes, 0 no)"


def test_the_sample_is_balanced_and_large_enough():
    read = read_questions("sample")
    labels = [question.label for question in read.questions]
    assert labels.count("yes") == labels.count("no") >= 60


QUIZ = {"id": "1", "stem": "Which one?", "passage": "B is.", "options": ["x", "y"], "key": "b"}
QUIZ_FIELDS = {"question": "stem", "context": "passage", "label": "key"}
QUIZ_OPTIONS = {"labels": ("A", "B", "C"), "fields": QUIZ_FIELDS}


def test_custom_fields_and_labels_are_read_in_the_spelling_of_the_labels(read):
    assert read([QUIZ, but(QUIZ, id="2", stem="And?", key=" X ")], **QUIZ_OPTIONS).questions == (
        Question("1", "Which one?\nA. x\nB. y", "B is.", "B"),
        Question("2", "And?\nA. x\nB. y", "B is.", "A"),
    )


def test_a_file_may_hold_a_single_record_with_custom_fields(read):
    record = {"stem": "Which one?", "key": "A"}
    assert len(read(record, labels=("A", "B"), fields={**QUIZ_FIELDS, "context": "none"}).questions) == 1


@pytest.mark.parametrize("fields", [{"label": "key"}, {"question": "stem"}, {"context": "passage"}])
def test_fields_that_are_not_named_are_detected(read, fields):
    record = {fields.get(ours, theirs): value for ours, theirs, value in (
        ("question", "question", "Is it?"), ("context", "context", "It is."), ("label", "final_decision", "no")
    )}  # fmt: skip
    question = read([record], fields=fields).questions[0]
    assert (question.text, question.context, question.label) == ("Is it?", "It is.", "no")


CAFE, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # one word in two forms


@pytest.mark.parametrize("label", [CAFE, DECOMPOSED])
@pytest.mark.parametrize("found", [CAFE, DECOMPOSED, DECOMPOSED.upper()])
def test_a_label_is_read_in_either_unicode_form_and_spelled_as_the_flag_spells_it(read, label, found):
    assert read([but(ground_truth=found)], labels=(label, "th\u00e9")).questions[0].label == label


@pytest.mark.parametrize("name", [CAFE, DECOMPOSED])
@pytest.mark.parametrize("as_rows", [False, True])
def test_a_fields_name_is_read_in_either_unicode_form_and_its_text_is_kept(read, monkeypatch, name, as_rows):
    record, fields = {**without("question"), name: DECOMPOSED, f"{name}s": DECOMPOSED}, {"question": CAFE}
    if as_rows:
        monkeypatch.setattr("grpo_ds.task.questions.open_source", lambda data, _: rows_to_source(data, [record]))
    (question,) = read([record], fields=fields).questions
    # A parameter of a reward function: Python composes it.
    assert (question.text, question.columns[f"{CAFE}s"]) == (DECOMPOSED, DECOMPOSED)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (but(OTHER, question=DECOMPOSED, context="It is."), "record 2: same question and context as record 1"),
        (but(OTHER, id=DECOMPOSED), "is taken by record 1, but its answer is 'yes', not 'no'; ids must differ"),
        (but(OTHER, **{CAFE: 1, DECOMPOSED: 2}), "appears twice in one object"),
    ],
)
def test_what_differs_only_in_its_unicode_form_is_there_twice(read, second, said):
    with pytest.raises(DataError, match=said):
        read([but(id=CAFE, question=CAFE), second])


def test_numbers_may_be_labels(read):
    assert read([but(ground_truth=2)], labels=("0", "1", "2")).questions[0].label == "2"


def test_a_data_set_may_have_no_context(read):
    records = [without("context"), without("context", OTHER)]
    assert [q.context for q in read(records, fields={"context": "none"}).questions] == ["", ""]


def test_a_question_keeps_its_record_and_has_the_columns_of_all_records(read):
    first, second = read([but(year=1999), but(OTHER, tags=["a"])]).questions
    assert first.columns == {**GOOD, "year": 1999, "tags": None}
    assert second.columns == {**OTHER, "year": None, "tags": ["a"]}
    assert hash(first) == hash(read([GOOD]).questions[0])  # columns are not part of a question's identity


OTHER_BAD = [  # content, options, words of the error
    ([without("passage", QUIZ)], QUIZ_OPTIONS, ["record 1: passage is missing", "--context_field"]),
    (
        [but(QUIZ, key="d")],
        QUIZ_OPTIONS,
        ["record 1: key is 'd', but there are only 2 options, A to B", "Labels: A or B or C"],
    ),
    ([GOOD], {"labels": ("A", "B")}, ["record 1: ground_truth is 'yes'; it must be A or B"]),  # no "maybe" here
    ([GOOD], {"fields": {"question": "stem"}}, ["record 1: stem is missing", "--question_field"]),
    ([but(question="")], {"fields": {"context": "none"}}, ["record 1: question is empty"]),
    (
        [GOOD, but(OTHER, question="Is it?")],
        {"fields": {"context": "none"}},
        ["record 2: same question and context as record 1"],
    ),
]


@pytest.mark.parametrize(("content", "options", "expected"), OTHER_BAD)
def test_errors_of_bad_records_use_the_names_of_custom_fields(read, content, options, expected):
    with pytest.raises(DataError) as error:
        read(content, **options)
    assert [part for part in expected if part not in str(error.value)] == [], str(error.value)


LONG = "x" * 500
TWICE = json.dumps({"10": ORIGINAL, "11": ORIGINAL}).replace("11", "10")
BAD = [  # content, words of the error
    (b"", ["data.json is empty"]),
    (" \n\n", ["data.json is empty"]),
    ("[]", ["data.json has no records"]),
    ("{}", ["data.json has no records"]),
    ("null", ["data.json holds null, not records"]),
    ('"yes"', ["holds a text, not records"]),
    ("NaN", ["holds NaN"]),
    ("[null]", ["record 1 is null, not an object"]),
    ([GOOD, "yes"], ["record 2 is a text, not an object"]),
    ([[GOOD, OTHER]], ["record 1 is a list, not an object"]),
    ({"data": [GOOD]}, ["record 1 ('data') is a list, not an object"]),
    ([GOOD, without("question", OTHER)], ["record 2: question is missing"]),
    ([GOOD, without("context", OTHER)], ["record 2: context is missing"]),
    ([GOOD, without("ground_truth", OTHER)], ["record 2: ground_truth is missing"]),
    ([without("final_decision", HUB_ROW)], ["record 1:", "is missing"]),
    ({"10": without("CONTEXTS", ORIGINAL)}, ["record 1 ('10'): CONTEXTS is missing"]),
    ({"10": without("final_decision", ORIGINAL)}, ["record 1 ('10'): final_decision is missing"]),
    ([{}], ["record 1: question is missing, context is missing, ground_truth is missing"]),
    ([but(question=None)], ["record 1: question is null, not a text"]),
    ([but(question=7)], ["record 1: question is a number, not a text"]),
    ([but(question=" \t")], ["record 1: question is empty"]),
    ([but(context="")], ["record 1: context is empty"]),
    ([but(context=[])], ["record 1: context is empty"]),
    ([but(context=["", " "])], ["record 1: context is empty"]),
    ([but(context=["a", None])], ["record 1: context is a list that holds null"]),
    ([but(context={"a": "b"})], ["record 1: context is an object, not a text"]),
    ([but(ground_truth="perhaps")], ["record 1: ground_truth is 'perhaps'; it must be yes or no or maybe"]),
    ([but(ground_truth=LONG)], ["record 1: ground_truth is 'xxx", "...'"]),
    ([but(ground_truth="a\nb")], [r"ground_truth is 'a\nb'"]),  # a label does not break the lines of an error
    ([but(ground_truth=True)], ["record 1: ground_truth is 'true'; it must be yes or no"]),
    ([but(ground_truth=float("nan"))], ["record 1: ground_truth is NaN (a missing value), not a text"]),
    ([but(ground_truth=["yes"])], ["record 1: ground_truth is a list, not a text"]),
    ([but(id=None)], ["record 1: id is null"]),
    ([but(id="")], ["record 1: id is empty"]),
    ([but(id=True)], ["record 1: id is true"]),
    (
        '[{"question": "\\ud800", "context": "c", "ground_truth": "no"}]',
        ["record 1: question holds a broken character"],
    ),
    ([GOOD, OTHER, but(OTHER, id="1")], ["record 3: same question and context as record 2; remove one"]),
    ([GOOD, but(OTHER, id="1")], ["record 2: id '1' is taken by record 1"]),
    ([GOOD, but(id="2", ground_truth="no")], ["record 2: same question and context as record 1"]),
    (TWICE, ["'10' appears twice in one object"]),
    (lines(GOOD, '{"id": "2", "id": "3"}'), ["line 2: 'id' appears twice in one object"]),
    (lines(GOOD, "{oops}", without("context", OTHER)), ["line 2: broken JSON, column 2", "line 3: context is missing"]),
    (
        lines(GOOD, "", "null", OTHER, but(OTHER, id="9")),
        ["line 3 is null", "line 5: same question and context as line 4"],
    ),
    ('[\n  {"question": "a",}\n]', ["is not valid JSON: line 2, column"]),
    ('[{"question": "a"', ["is not valid JSON: line 1, column 18"]),
    ("question,context\na,b", ["line 2: ground_truth is missing"]),
    ("[" * 100_000, ["nested too deeply"]),
    (f"[{'1' * 5000}]", ["record 1 is infinity, not an object"]),
    (
        '[{"question": "caf\u00e9"}]'.encode("latin-1"),
        ["is not UTF-8 text: byte 0xe9 at offset 18", "Save it as UTF-8"],
    ),
    (json.dumps([GOOD]).encode("utf-16"), ["is not UTF-8 text: it begins like text in UTF-16", "iconv -f UTF-16"]),
    (b"\x1f\x8b\x08", ["is not UTF-8 text: it begins like a gzip archive", "Unpack it first"]),
    ([but(ground_truth="maybe")], ["no record labelled yes or no, only 1 maybe", "--labels yes,no,maybe"]),
]


@pytest.mark.parametrize(("content", "expected"), BAD)
def test_the_error_of_bad_data_names_its_place_in_six_lines(read, content, expected):
    with pytest.raises(DataError) as error:
        read(content)
    message = str(error.value)
    assert "data.json" in message
    assert [part for part in expected if part not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES
    assert max(map(len, message.splitlines())) < 250


def test_all_bad_records_are_counted_and_the_first_are_shown(read):
    with pytest.raises(DataError) as error:
        read([GOOD, *[{"question": "a"}] * 20])
    first, *shown, more, remedy = str(error.value).splitlines()
    assert first.endswith("data.json: 20 problems (21 records read):")
    assert shown == [f"  record {n}: context is missing, ground_truth is missing" for n in (2, 3, 4)]
    assert more == "  ... and 17 more" and remedy.startswith('Records: {"question"')


MISSING = ["no.json", "folder/no.jsonl", "./no", "no", "a/b/c", "/no/where.json", "", "x" * 5000]


@pytest.mark.parametrize("data", MISSING)
def test_the_error_of_a_missing_file_names_the_alternatives(data):
    with pytest.raises(DataError) as error:
        read_questions(data)
    assert f"no data file {data}" in str(error.value)
    assert "--data sample" in str(error.value) and "qiaojin/PubMedQA" in str(error.value)


def test_a_folder_is_not_a_data_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_questions(str(tmp_path))


def test_a_slash_below_an_existing_folder_means_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no data file data/mine"):
        read_questions("data/mine")


def test_a_hub_that_cannot_be_reached_is_reported_at_once_with_the_alternatives(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "urlopen", unreachable)
    with pytest.raises(DataError) as error:
        read_questions("qiaojin/PubMedQA")
    for part in ("qiaojin/PubMedQA", "  Name or service not known", "--data FILE.json", "--data sample"):
        assert part in str(error.value)


def test_a_hub_data_set_that_datasets_cannot_load_gives_the_same_error(monkeypatch):
    import datasets

    def fails(*_, **__):
        raise ConnectionError("Couldn't reach it\nand a long story")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="  Couldn't reach it and a long story\nName another config"):
        read_questions("someone/questions")


def test_a_hub_data_set_is_loaded_with_its_config_and_read(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or [HUB_ROW])
    read = read_questions("qiaojin/PubMedQA", labels=("maybe",))
    assert calls == [(("qiaojin/PubMedQA", "pqa_labeled"), {"split": "train"})]
    assert read.questions[0].id == "7"


def test_rows_of_a_table_become_numbered_records():
    assert rows_to_source("table", [{"a": 1, "b": None}]) == Source(
        "table", (("record 1", {"a": 1}),), form="rows of records"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),  # half pairs too
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=4), parts, max_size=3),
    max_leaves=6,
)
NEARLY = st.sampled_from(["yes", "No ", "maybe", "1", "Is it?", ["It", "is."], {"contexts": ["It", "is."]}, " ", 7])
NAMES = sorted({*REQUIRED_NAMES, "id", "pubid", "year"})
RECORDS = st.dictionaries(st.sampled_from(NAMES), NEARLY | JSON) | st.fixed_dictionaries(
    {"question": NEARLY | JSON, "context": NEARLY | JSON, "ground_truth": NEARLY}, optional={"id": JSON}
)


@settings(deadline=None)  # the cores are shared
@given(RECORDS | JSON)
def test_any_record_is_usable_or_its_problems_are_reported(record):
    fields, problems = check_record(record, known_labels=("yes", "no", "maybe"))
    assert all(len(problem.splitlines()) == 1 and len(problem) < 200 for problem in problems)
    if not problems:
        assert {"text", "context", "label"} <= set(fields) <= {"text", "context", "label", "id"}
        assert fields["label"] in ("yes", "no", "maybe")
        for name, value in fields.items():
            assert value == value.strip() and (value or name == "context") and not BROKEN.search(value)
            assert value.encode() is not None


def questions_or_error(path):
    """Read a file: return its questions, all different, or check its error and return None."""
    try:
        questions = read_questions(str(path)).questions
    except DataError as error:
        assert path.name in str(error) and len(str(error).splitlines()) <= MAX_LINES
        return None
    assert len({question.id for question in questions}) == len(questions) > 0
    return questions


@pytest.fixture(scope="module")
def any_file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "data.json"


@settings(deadline=None)  # the cores are shared
@given(value=st.lists(RECORDS, max_size=4) | st.dictionaries(st.text(max_size=4), RECORDS, max_size=3) | JSON)
def test_any_json_gives_questions_or_an_error_of_six_lines(any_file, value):
    any_file.write_text(json.dumps(value))
    questions_or_error(any_file)


@settings(deadline=None)  # the cores are shared
@given(
    content=st.binary(max_size=40) | st.text(st.sampled_from('[]{}":,\\ \r\n0ue\ufeff'), max_size=20).map(str.encode)
)
def test_any_bytes_give_an_error_of_six_lines(any_file, content):
    any_file.write_bytes(content)
    assert questions_or_error(any_file) is None


@settings(deadline=None)  # the cores are shared
@given(place=st.integers(0, 200), byte=st.binary(max_size=2), cut=st.integers(0, 3))
def test_any_small_damage_to_a_good_file_never_crashes(any_file, place, byte, cut):
    good = json.dumps([GOOD, OTHER]).encode()
    any_file.write_bytes(good[:place] + byte + good[place + cut :])
    questions_or_error(any_file)
