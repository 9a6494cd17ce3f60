"""Shapes of records (GSM8K, MMLU, MedQA, TRL), kinds of answers, and what is said about bad ones."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from grpo_ds.errors import MAX_LINES, DataError
from grpo_ds.task.question import Question
from grpo_ds.task.questions import fingerprint, read_questions
from grpo_ds.task.record_shapes import FieldNames
from tests.conftest import check_example

WORD_PROBLEMS = Path(__file__).resolve().parents[1] / "data" / "word_problems.jsonl"
GSM8K = {"question": "6 times 7?", "answer": "6 * 7 = <<6*7=42>>42.\n#### 42"}
MEDQA = {
    "question": "Which vitamin prevents scurvy?",
    "options": {"A": "Vitamin A", "B": "Vitamin C", "C": "Vitamin D"},
    "answer": "Vitamin C",
    "answer_idx": "B",
    "meta_info": "step1",
}
MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "arithmetic"}
USER = {"role": "user", "content": "Write a haiku."}
SYSTEM = {"role": "system", "content": "You are a poet."}
ASKED_MEDQA = "Which vitamin prevents scurvy?\nA. Vitamin A\nB. Vitamin C\nC. Vitamin D"
ASKED_MMLU = "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6"
LETTERS = {"labels": ("A", "B", "C", "D")}
NUMBER, TEXT, NONE = ({"answers": kind} for kind in ("number", "text", "none"))


def but(record, **changes):
    return {**record, **changes}


@pytest.fixture
def read(tmp_path):
    def write_and_read(records, **options):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records if isinstance(records, list) else [records]))
        return read_questions(str(path), **options)

    return write_and_read


def test_the_example_of_the_field_names_is_right():
    check_example(FieldNames)


GOOD = [  # record, options, text, label, accepted
    (GSM8K, NUMBER, "6 times 7?", "42", ()),
    (but(GSM8K, answer="42"), NUMBER, "6 times 7?", "42", ()),
    (but(GSM8K, answer=42), NUMBER, "6 times 7?", "42", ()),
    (but(GSM8K, answer="#### 1,042"), NUMBER, "6 times 7?", "1042", ()),
    (but(GSM8K, answer=0.1), NUMBER, "6 times 7?", "0.1", ()),
    (but(GSM8K, answer=1e-7), NUMBER, "6 times 7?", "0.0000001", ()),
    (but(GSM8K, answer="-1/3"), NUMBER, "6 times 7?", "-1/3", ()),
    (but(GSM8K, answer="It is #### 4\n####42\n"), NUMBER, "6 times 7?", "42", ()),
    (but(GSM8K, ground_truth=6), NUMBER, "6 times 7?", "6", ()),  # what is called the truth is meant
    ({"question": "6 times 7?", "ground_truth": "42"}, NUMBER, "6 times 7?", "42", ()),
    ({"prompt": "6 times 7?", "solution": "42"}, NUMBER, "6 times 7?", "42", ()),
    (GSM8K, TEXT, "6 times 7?", "42", ("42",)),
    (but(GSM8K, answer=" Rome "), TEXT, "6 times 7?", "Rome", ("Rome",)),
    (but(GSM8K, answer=["Rome", "Roma", "Rome"]), TEXT, "6 times 7?", "Rome", ("Rome", "Roma")),
    (MEDQA, LETTERS, ASKED_MEDQA, "B", ()),
    ({name: MEDQA[name] for name in ("question", "options", "answer")}, LETTERS, ASKED_MEDQA, "B", ()),
    ({name: MEDQA[name] for name in ("question", "options", "answer_idx")}, LETTERS, ASKED_MEDQA, "B", ()),
    (but(MEDQA, answer_idx=" b"), LETTERS, ASKED_MEDQA, "B", ()),
    (but(MEDQA, options={**MEDQA["options"], "D": None}), LETTERS, ASKED_MEDQA, "B", ()),  # as Parquet fills a gap
    (MEDQA, TEXT, ASKED_MEDQA, "B", ("B", "Vitamin C")),
    (MMLU, LETTERS, ASKED_MMLU, "B", ()),
    (but(MMLU, answer="B"), LETTERS, ASKED_MMLU, "B", ()),
    (but(MMLU, choices=["a", "b", "c", "d"], answer="3"), LETTERS, "2 + 2?\nA. a\nB. b\nC. c\nD. d", "D", ()),
    (but(MMLU, choices=[3, 4.5, 5, 6], answer=0), LETTERS, "2 + 2?\nA. 3\nB. 4.5\nC. 5\nD. 6", "A", ()),
    ({"question": "2 + 2?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}, LETTERS, ASKED_MMLU, "B", ()),
    ({"question": "Is it?", "options": ["yes", "no"], "answer": "no"}, {}, "Is it?", "no", ()),  # they are the labels
    (but(GSM8K, answer="yes", options="see above"), {}, "6 times 7?", "yes", ()),  # no options, a remark
    ({"question": "Is it?", "answer": "yes"}, {}, "Is it?", "yes", ()),
    ({"prompt": "Is it?", "answer": "yes", "year": 1999}, {}, "Is it?", "yes", ()),
    ({"prompt": "Write a haiku."}, NONE, "Write a haiku.", "", ()),
    ({"question": "Write a haiku."}, NONE, "Write a haiku.", "", ()),
    ({"prompt": "Write a haiku.", "answer": [1, {}], "label": None}, NONE, "Write a haiku.", "", ()),
]


@pytest.mark.parametrize(("record", "options", "text", "label", "accepted"), GOOD)
def test_a_record_of_each_shape_becomes_its_question(read, record, options, text, label, accepted):
    (found,) = read(record, **options).questions
    assert (found.text, found.context, found.label, found.accepted) == (text, "", label, accepted)
    assert found.messages == () and {**found.columns} == record  # reward functions get the record as it is


@pytest.mark.parametrize("name", ["prompt", "messages"])
@pytest.mark.parametrize("turns", [[USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "No."}, USER]])
def test_a_chat_is_kept_whole_and_its_last_turn_is_the_question(read, name, turns):
    (found,) = read({name: turns, "topic": "sea"}, answers="none").questions
    assert (found.text, found.messages, found.label) == ("Write a haiku.", tuple(turns), "")
    assert found.columns["topic"] == "sea"


def test_chats_with_one_last_turn_are_two_questions_if_they_begin_differently(read):
    chats = [{"prompt": [USER]}, {"prompt": [SYSTEM, USER]}]
    first, second = read(chats, answers="none").questions
    assert first.id != second.id and fingerprint(first) != fingerprint(second)
    with pytest.raises(DataError, match="record 3: same question and context as record 2; remove one"):
        read([*chats, chats[1]], answers="none")


def test_a_chat_in_a_field_that_a_flag_names_is_read_too(read):
    (found,) = read({"talk": [USER], "key": "yes"}, fields={"question": "talk", "label": "key"}).questions
    assert (found.text, found.messages, found.label) == ("Write a haiku.", (USER,), "yes")


def test_a_context_is_taken_where_it_is_and_not_needed_beside_an_answer(read):
    records = [but(GSM8K, context="Count."), but(GSM8K, question="7 times 6?")]
    assert [question.context for question in read(records, answers="number").questions] == ["Count.", ""]


def test_the_text_of_a_question_without_messages_has_the_fingerprint_that_it_always_had():
    # trained_on.txt of older runs holds such hashes.
    assert fingerprint(Question("1", "Is it?", "It is.", "yes")) == "f6479732c1e3"


def test_counts_are_of_classes_or_of_questions(read):
    assert read([MEDQA], labels=("A", "B", "C")).source.endswith("data.json: 1 question (0 A, 1 B, 0 C)")
    assert read([GSM8K], answers="number").source.endswith("data.json: 1 question (answers are numbers)")
    assert read([GSM8K, but(GSM8K, question="?")], answers="text").source.endswith(": 2 questions (answers are texts)")
    assert read([{"prompt": "Go."}], answers="none").source.endswith("data.json: 1 prompt")


FORMS = [
    ([GSM8K], NUMBER, "a JSON list; question 'question', answer 'answer'"),
    ([MEDQA], LETTERS, "a JSON list; question 'question', options 'options', answer 'answer_idx'"),
    ([{"prompt": [USER]}], NONE, "a JSON list; question 'prompt'"),
    (
        [but(GSM8K, context="c"), GSM8K, but(GSM8K, question="?")],
        NUMBER,
        "a JSON list; question 'question', answer 'answer' in 2 of 3 records, 1 other shape",
    ),
]


@pytest.mark.parametrize(("records", "options", "form"), FORMS)
def test_what_was_detected_is_said_in_a_line(read, records, options, form):
    assert read(records, **options).form == form


BAD = [  # record, options, words of the error
    (but(GSM8K, answer="about forty"), NUMBER, ["record 1: answer is 'about forty', which is not a number"]),
    (but(GSM8K, answer="#### forty"), NUMBER, ["record 1: answer is 'forty', which is not a number"]),
    (but(GSM8K, answer="It is\n####"), NUMBER, ["record 1: answer has nothing behind its ####"]),
    (but(GSM8K, answer=float("nan")), NUMBER, ["record 1: answer is NaN (a missing value), not a number"]),
    (but(GSM8K, answer=True), NUMBER, ["record 1: answer is true, not a number"]),
    (but(GSM8K, answer=["42"]), NUMBER, ["record 1: answer is a list, not a number"]),
    (but(GSM8K, answer=""), NUMBER, ["record 1: answer is empty"]),
    (
        {"question": "6 times 7?"},
        NUMBER,
        ["record 1: answer is missing", 'Records: {"question": "...", "answer": "42"'],
    ),
    ({"prompt": "6 times 7?"}, TEXT, ["record 1: ground_truth is missing", 'Records: {"question"']),
    (but(GSM8K, answer=[]), TEXT, ["record 1: answer is an empty list"]),
    (but(GSM8K, answer=["a", None]), TEXT, ["record 1: answer is a list that holds null"]),
    (but(GSM8K, answer=["a", " "]), TEXT, ["record 1: answer is empty"]),
    (but(MEDQA, answer_idx="E"), LETTERS, ["record 1: answer_idx is 'E', but there are only 3 options, A to C"]),
    (but(MMLU, answer=4), LETTERS, ["answer is '4', but there are only 4 options, A to D; an index counts from 0"]),
    (but(MMLU, answer=-1), LETTERS, ["answer is '-1', but there are only 4 options, A to D"]),
    (but(MMLU, answer="2", choices=["1", "2", "3"]), LETTERS, ["'2', the text of option B and the index of C; give"]),
    (
        but(MMLU, answer="x", choices=["x", "x"]),
        LETTERS,
        ["answer is 'x', the text of options A and B; give the"],
    ),
    (but(MMLU, choices=["3", " "]), LETTERS, ["record 1: choices[B] is empty"]),
    (but(MMLU, choices=["3", ["4"]]), LETTERS, ["record 1: choices[B] is a list, not a text"]),
    (but(MMLU, choices=[]), LETTERS, ["record 1: choices holds no option"]),
    (but(MMLU, choices="['3', '4']"), LETTERS, ["record 1: choices is a text, not a list", '["first", "second"]']),
    (but(MMLU, choices=[*map(str, range(27))]), LETTERS, ["choices has 27 options, more than there are letters"]),
    (but(MEDQA, answer="Vitamin D"), LETTERS, ["answer_idx says 'B' and answer 'C'; choose with --label_field"]),
    ({"prompt": []}, NONE, ["record 1: prompt is a list, not a text"]),
    ({"prompt": [USER, {"role": "assistant", "content": "No."}]}, NONE, ["prompt ends with the turn of the assistant"]),
    ({"messages": [USER, SYSTEM, USER]}, NONE, ["messages has a system prompt as turn 2; it must be the first"]),
    ({"messages": [but(USER, role="tool")]}, NONE, ["messages has the role 'tool' in turn 1; roles are system, user"]),
    ({"messages": [{"content": "Go."}]}, NONE, ["messages has null as role in turn 1"]),
    (
        {"messages": [but(USER, content=[{"type": "image"}])]},
        NONE,
        ["has a turn 1 whose content is a list, not a text"],
    ),
    ({"messages": [but(USER, content="\0")]}, NONE, ["turn 1 whose content holds a broken character, U+0000"]),
    ({"messages": [USER, "Go."]}, NONE, ["record 1: messages is a list, not a text"]),
    ({"text": "Go."}, NONE, ["record 1: question is missing", "Fields here: text. Name", "--question_field"]),
    (
        {"Frage": "?", "Abstract": "a", "Wert": 1},
        NUMBER,
        ["Fields here: Frage, Abstract, Wert; try --question_field Frage"],
    ),
    ({"question": "?", "Antwort": "4"}, NUMBER, ["Fields here: question, Antwort; try --label_field Antwort"]),
    ({"question": "?", "x": "4"}, NUMBER, ["Fields here: question, x; name the answer's field (--label_f"]),
    (
        {"question": "?", "Kontext": "c", "ground_truth": "yes"},
        {},
        ["context is missing", "Fields here: question, Kontext, ground_truth; try --context_field Kontext"],
    ),
    ({"question": "?", "ground_truth": "yes"}, {}, ["Fields here: question, ground_truth; try --context_field none"]),
    (
        [but(GSM8K, id=1), {"id": 1, "question": "6 times 8?", "answer": "48"}],
        NUMBER,
        ["record 2: id '1' is taken by record 1, but its answer is '42', not '48'; ids must differ"],
    ),
]


@pytest.mark.parametrize(("record", "options", "expected"), BAD)
def test_a_bad_record_of_each_shape_is_named_in_six_lines(read, record, options, expected):
    with pytest.raises(DataError) as error:
        read(record, **options)
    message = str(error.value)
    assert [part for part in expected if part not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES and max(map(len, message.splitlines())) < 300


UNUSED = [  # record, options, the reason why its column of options is in no prompt (None: it is, or need not be)
    (MMLU, LETTERS, None),
    ({"question": "Is it?", "answer": "yes", "options": ["yes", "no"]}, {}, None),  # the labels themselves
    ({"question": "?", "answer": "A", "options": "A) iron B) lead"}, LETTERS, "'options' .* is a text, not a list; a"),
    ({"question": "?", "answer": "A", "Options": ["iron", "lead"]}, LETTERS, "'Options' .* must be called 'options'"),
    (but(MMLU, options=["3", "4", "5", "6"]), LETTERS, "'choices' .* 'options' is taken"),
    ({"prompt": [USER], "answer": "A", "choices": ["iron", "lead"]}, LETTERS, "'choices' .* a chat is not changed"),
]


@pytest.mark.parametrize(("record", "options", "reason"), UNUSED)
def test_a_column_of_options_that_no_prompt_shows_is_a_warning(read, record, options, reason):
    warnings = read(record, **options).warnings
    assert [bool(re.search(reason, it)) for it in warnings] == [True] if reason else warnings == ()
    assert all(it.startswith("Warning: ") and "of 1 of 1 records" in it for it in warnings)


DEUTSCH, STUDIE = {"Frage": "?", "Antwort": "ja"}, "In beiden Gruppen sank es gleich."
REMEDIES = [  # records, the flags that the error recommends and that then read them
    ([{"question": f"{n}?", "answer": ("ja", "nein")[n % 2]} for n in range(6)], {"labels": ("ja", "nein")}),
    ([but(MMLU, question=f"{n}?", answer=n % 3) for n in range(6)], {"labels": ("A", "B", "C", "D")}),
    ([{"question": f"{n}?", "answer": f"#### {n}"} for n in range(12)], {"answers": "number"}),
    ([{"question": f"{n}?", "answer": f"a word for {n}"} for n in range(12)], {"answers": "text"}),
    ([{"prompt": f"Count to {n}."} for n in range(3)], {"answers": "none"}),
    (
        [{"Frage": f"{n}?", "Antwort": ("yes", "no")[n % 2], "Jahr": n} for n in range(4)],
        {"fields": {"question": "Frage", "label": "Antwort", "context": "none"}},
    ),
    (
        [
            {"Frage": f"{n}?", "Antwort": ("yes", "no")[n % 2], "Begr\u00fcndung": "weil es in beiden Gruppen sank"}
            for n in range(4)
        ],
        {"fields": {"question": "Frage", "label": "Antwort", "context": "none"}},
    ),
    (
        [{"Question": f"{n}?", "Context": "c", "Answer": "yes"} for n in range(4)],
        {"fields": {"question": "Question", "label": "Answer", "context": "Context"}},
    ),
    (
        [
            {"Frage": f"{n}?", "Studie": "In beiden Gruppen sank es gleich.", "Antwort": ("ja", "nein")[n % 2]}
            for n in range(4)
        ],
        {"fields": {"question": "Frage", "label": "Antwort", "context": "Studie"}, "labels": ("ja", "nein")},
    ),
]


def typed(options):
    """The flags as a message writes them."""
    fields = [f"--{role}_field {name}" for role, name in options.get("fields", {}).items()]
    labels = [f"--labels {','.join(options['labels'])}"] if "labels" in options else []
    return " ".join([*fields, *labels, *([f"--answers {options['answers']}"] if "answers" in options else [])])


@pytest.mark.parametrize(("records", "options"), REMEDIES)
def test_data_of_another_kind_is_refused_with_the_flags_that_read_it(read, records, options):
    with pytest.raises(DataError) as error:
        read(records)
    last = str(error.value).splitlines()[-1]
    assert typed(options) in last and ("--labels" in last) == ("labels" in options)
    assert len(read(records, **options).questions) == len(records)


def steps(answer):
    """(expression, result) of each step of a worked answer."""
    return re.findall(r"<<(.+?)=([^=]+?)>>", answer)


WORDS = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "two": 2, "four": 4, "five": 5}
KNOWN = {1, 2, 7, 60, 100, 1000}  # the whole, both sides, days, minutes, centimetres and per cent, metres


def value(expression):
    """The value of an expression of numbers and + - * / ( ), exact."""
    assert re.fullmatch(r"[\d.+\-*/() ]+", expression), expression
    return eval(re.sub(r"[\d.]+", lambda number: f"Fraction('{number[0]}')", expression), {"Fraction": Fraction})


def test_the_word_problems_of_the_tests_are_right():
    records = [json.loads(line) for line in WORD_PROBLEMS.read_text().splitlines()]
    questions = read_questions(str(WORD_PROBLEMS), answers="number").questions
    assert len(questions) == len(records) >= 60
    for record, question in zip(records, questions, strict=True):
        known = {Fraction(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", record["question"])}
        known |= {Fraction(count) for word, count in WORDS.items() if word in record["question"].lower()}
        for expression, result in steps(record["answer"]):
            assert value(expression) == Fraction(result), record
            used = {Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", expression)}
            assert used - known <= KNOWN, record  # every number comes from the question or from a step before
            known |= {abs(Fraction(result)), *map(Fraction, re.findall(r"\d+", result))}
        assert Fraction(question.label) == Fraction(steps(record["answer"])[-1][1])


LONG = "It helped nine of ten people in a trial of a year."
BOTH = {"question": "Frage", "label": "Antwort"}


@pytest.mark.parametrize(
    ("record", "fields", "named"),
    [
        ({"Frage": "?", "Antwort": "yes", "Abstract": "a"}, BOTH, "Abstract"),
        ({"Frage": "?", "Antwort": "yes", "Befund": LONG}, BOTH, "Befund"),
        ({"Frage": "?", "Antwort": "yes", "my text": LONG}, BOTH, "'my text'"),
        ({"Frage": "?", "Antwort": "yes", "Abstract": "a"}, {**BOTH, "context": "none"}, None),
        ({"Frage": "?", "Antwort": "yes", "Abstract": "a"}, {**BOTH, "context": "Abstract"}, None),
        ({"Frage": "?", "Antwort": "yes", "Nr": 7}, BOTH, None),
        ({"text": LONG, "label": "yes"}, {"question": "text", "label": "label"}, None),
        ({"Frage": "?", "Antwort": "yes", "Kommentar": LONG}, BOTH, None),  # gives the answer away
        ({"Frage": "?", "Antwort": "yes", "answer": LONG}, BOTH, None),
        ({"Frage": "?", "Antwort": "A", "options": ["yes", LONG], "text": LONG}, BOTH, None),
        ({"messages": [USER], "answer": "yes", "text": LONG}, {}, None),
    ],
)
def test_a_column_that_looks_like_a_context_is_not_left_out_in_silence(tmp_path, record, fields, named):
    (tmp_path / "q.json").write_text(json.dumps([record]))
    labels = ("A", "B") if "options" in record else ("yes", "no")
    found = read_questions(str(tmp_path / "q.json"), labels=labels, fields=fields)
    said = [line for line in found.warnings if "no prompt has a context" in line]
    assert [f"--context_field {named}," in line for line in said] == ([True] if named else [])
