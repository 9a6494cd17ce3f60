"""A collection of malformed input: each case gives its error or its documented repair (docs/data.md).

NAMED_FILES, NAMED_RECORDS and NAMED_SETTINGS list refused input with words that the error must hold; REPAIRED lists
input that is read, with the resulting questions. Every line is a different fault.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_ds.errors import MAX_LINES, DataError, UsageError
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import CONFIG_FILE, prompt_recipe
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.prompts import encode_prompt
from grpo_ds.task.questions import Question, read_questions, split_questions

ROOT = Path(__file__).resolve().parents[2]
KIND = "malformed data"
ONE = {"id": "1", "question": "Is it?", "context": "It is.", "ground_truth": "yes"}
TWO = {"id": "2", "question": "Was it?", "context": "It was not.", "ground_truth": "no"}
PMID = {"QUESTION": "Is it?", "CONTEXTS": ["It", "is."], "final_decision": "yes"}
LIST = json.dumps([ONE, TWO])
LINE, OTHER_LINE = json.dumps(ONE), json.dumps(TWO)
TEN_MB = "The trial was long. " * 500_000


def but(record=ONE, **changes):
    return {**record, **changes}


def raw(field, value):
    """File of one record, in which one field is this piece of JSON, inserted unchanged."""
    return json.dumps([but(**{field: "@"})]).replace('"@"', value)


def nested(depth):
    return "[" * depth + "]" * depth


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.json", LIST)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("data.json")
        member.size = len(LIST)
        archive.addfile(member, io.BytesIO(LIST.encode()))
    return file.getvalue()


NOT_TEXT = "is not UTF-8 text"
NOT_JSON = "is not valid JSON: line "
NAMED_FILES = [  # description, the file's bytes or text, words of its error
    # Encodings.
    ("UTF-16 with its mark", LIST.encode("utf-16"), [NOT_TEXT, "UTF-16", "iconv"]),
    ("UTF-16, big end first", b"\xfe\xff" + LIST.encode("utf-16-be"), [NOT_TEXT, "UTF-16"]),
    ("UTF-16 without a mark", LIST.encode("utf-16-le"), [NOT_TEXT, "NUL byte at offset 1", "UTF-16"]),
    ("UTF-16, big end first, no mark", LIST.encode("utf-16-be"), [NOT_TEXT, "NUL byte at offset 0"]),
    ("UTF-32 with its mark", LIST.encode("utf-32"), [NOT_TEXT, "UTF-32"]),
    ("UTF-32 without a mark", LIST.encode("utf-32-le"), [NOT_TEXT, "NUL byte at offset 1"]),
    ("Latin-1", '[{"question": "d\xe9j\xe0"}]'.encode("latin-1"), [NOT_TEXT, "byte 0xe9 at offset 16", "iconv"]),
    ("Windows quotes", '[{"question": "\u201cSo\u201d?"}]'.encode("cp1252"), [NOT_TEXT, "byte 0x93 at offset 15"]),
    ("Shift-JIS", '[{"question": "\u85ac"}]'.encode("shift_jis"), [NOT_TEXT, "byte 0x96"]),
    ("GB 18030", '[{"question": "\u836f\u7269"}]'.encode("gb18030"), [NOT_TEXT, "byte 0xce"]),
    ("KOI8-R", '[{"question": "\u0434\u0430"}]'.encode("koi8-r"), [NOT_TEXT, "byte 0xc4"]),
    ("EBCDIC", LIST.encode("cp037"), [NOT_TEXT]),
    ("UTF-8 cut within a character", '["\u00e9'.encode()[:-1], [NOT_TEXT, "byte 0xc3 at offset 2"]),
    ("a character spelled too long", b'[{"question": "\xc0\x80"}]', [NOT_TEXT, "byte 0xc0"]),
    ("half a pair as three bytes", b'[{"question": "\xed\xa0\x80"}]', [NOT_TEXT, "byte 0xed"]),
    ("beyond the last code point", b'[{"question": "\xf4\x90\x80\x80"}]', [NOT_TEXT, "byte 0xf4"]),
    ("a mark twice", b"\xef\xbb\xbf\xef\xbb\xbf" + LIST.encode(), [NOT_JSON + "1, column 1", "BOM"]),
    ("marks of files put together", f"{LINE}\n\ufeff{OTHER_LINE}", ["line 2: broken JSON, column 1", "BOM"]),
    ("nothing but a mark", b"\xef\xbb\xbf", ["data.json is empty"]),
    ("UTF-7", LIST.encode("utf-7").replace(b"[", b"+AFs-"), [NOT_JSON + "1, column 1"]),
    # Other formats.
    ("gzip", gzip.compress(LIST.encode()), [NOT_TEXT, "a gzip archive", "Unpack"]),
    ("bzip2", bz2.compress(LIST.encode()), [NOT_TEXT, "a bzip2 archive"]),
    ("xz", lzma.compress(LIST.encode()), [NOT_TEXT, "an xz archive"]),
    ("zstd", b"\x28\xb5\x2f\xfd\x04\x00\x01", [NOT_TEXT, "a zstd archive"]),
    ("zip", zipped(), [NOT_TEXT, "a zip archive"]),
    ("tar", tarred(), [NOT_TEXT, "NUL byte at offset 9"]),
    (
        "Parquet cut off",
        b"PAR1\x15\x04PAR1",
        ["begins like a Parquet table, but it cannot be read: ", "cut off or damaged"],
    ),
    ("Arrow", b"ARROW1\0\0", [NOT_TEXT, "an Arrow table"]),
    ("SQLite", b"SQLite format 3\0", [NOT_TEXT, "an SQLite database"]),
    ("PDF", b"%PDF-1.7\n%\xe2\xe3", [NOT_TEXT, "a PDF document"]),
    ("an old office document", b"\xd0\xcf\x11\xe0\xa1\xb1", [NOT_TEXT, "byte 0xd0"]),
    ("pickle", pickle.dumps([ONE]), [NOT_TEXT]),
    ("a picture", b"\x89PNG\r\n\x1a\n", [NOT_TEXT, "byte 0x89"]),
    ("zeros, as a full disk leaves", bytes(4096), [NOT_TEXT, "NUL byte at offset 0"]),
    ("zeros at the end", LIST.encode() + bytes(8), [NOT_TEXT, f"NUL byte at offset {len(LIST)}"]),
    ("noise", random.Random(0).randbytes(1000), [NOT_TEXT]),
    (
        "prose with commas",
        "Well, this is it.\nAnd so, as I said, it was.\nThat is all.",
        [NOT_JSON + "1, column 1", "CSV"],
    ),
    ("YAML", "- question: Is it?\n  context: It is.\n", [NOT_JSON + "1"]),
    ("XML", "<records><record/></records>", [NOT_JSON + "1"]),
    ("a web page of an error", "<!DOCTYPE html><html><title>404</title></html>", [NOT_JSON + "1"]),
    ("what a server said", "Entry not found", [NOT_JSON + "1"]),
    ("a pointer of git-lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", [NOT_JSON + "1"]),
    ("a conflict of git", f"[\n<<<<<<< HEAD\n{LINE}\n=======\n{OTHER_LINE}\n>>>>>>> x\n]", [NOT_JSON + "2, column 1"]),
    ("Python", "[{'question': 'Is it?', 'context': None}]", [NOT_JSON + "1, column 3"]),
    ("JavaScript", f"var data = {LIST};", [NOT_JSON + "1"]),
    ("base64", "W3siaWQiOiAiMSJ9XQ==", [NOT_JSON + "1"]),
    ("JSON after record separators", f"\x1e{LINE}\n\x1e{OTHER_LINE}\n", [NOT_JSON + "1, column 1"]),
    # Almost JSON.
    ("a comma after the last record", f"[\n{LINE},\n{OTHER_LINE},\n]", [NOT_JSON + "4, column 1"]),
    ("a comma after the last field", f"[{LINE[:-1]},}}]", [NOT_JSON + "1"]),
    ("no comma between records", f"[{LINE}\n{OTHER_LINE}]", [NOT_JSON + "2, column 1"]),
    ("a list cut off", LIST[:-20], [NOT_JSON + "1"]),
    ("a last line cut off", f"{LINE}\n{OTHER_LINE[:-9]}", ["line 2: broken JSON, column"]),
    ("a comma after every line", f"{LINE},\n{OTHER_LINE},\n", ["line 1: broken JSON", "line 2: broken JSON"]),
    ("two lists", f"{LIST}\n{LIST}", [NOT_JSON + "2, column 1: Extra data"]),
    ("prose after the lines", f"{LINE}\n{OTHER_LINE}\n(2 rows)", ["line 3: broken JSON, column 1"]),
    ("numbered lines", f"1: {LINE}\n2: {OTHER_LINE}", [NOT_JSON + "1, column 2"]),
    ("comments", f"// questions\n{LIST}", [NOT_JSON + "1, column 1"]),
    ("bare names", '[{question: "Is it?"}]', [NOT_JSON + "1, column 3"]),
    ("curly quotes", "[{\u201cquestion\u201d: 1}]", [NOT_JSON + "1, column 3"]),
    ("a line break within a text", f"[{LINE[:30]}\n{LINE[30:]}]", [NOT_JSON + "1", "Invalid control character"]),
    ("a tab within a text", LIST.replace("It is", "It\tis"), [NOT_JSON + "1", "Invalid control character"]),
    ("an escape that is none", LIST.replace("Is it", r"Is \xe9"), [NOT_JSON + "1", r"Invalid \escape"]),
    ("an escape cut short", LIST.replace("Is it", r"Is \u12"), [NOT_JSON + "1", r"\uXXXX"]),
    ("lines ended as nobody does", f"{LINE}\u2028{OTHER_LINE}", ["line 1: broken JSON", "Extra data"]),
    ("a hard space before it", f"\xa0{LIST}", [NOT_JSON + "1, column 1"]),
    ("an end of file from DOS", f"{LIST}\x1a", [NOT_JSON + "1", "Extra data"]),
    ("a number with a leading zero", raw("id", "007"), [NOT_JSON + "1"]),
    ("nested without end", nested(50_000), ["nested too deeply"]),
    ("one line of many nested without end", f"{LINE}\n{nested(50_000)}", ["line 2: broken JSON, it is nested too dee"]),
    ("a number of 5,000 digits", raw("id", "9" * 5000), ["record 1: id is infinity, not a text"]),
    # JSON, but no records.
    ("nothing", b"", ["data.json is empty"]),
    ("white space", "\r\n\t\r\n", ["data.json is empty"]),
    ("null", "null", ["holds null, not records"]),
    ("true", "true", ["holds true, not records"]),
    ("a number", "3.5", ["holds a number, not records"]),
    ("infinity", "-Infinity", ["holds infinity, not records"]),
    ("JSON within JSON", json.dumps(LIST), ["holds a text, not records"]),
    ("an empty list", "[]", ["has no records"]),
    ("an empty mapping", "{}", ["has no records"]),
    ("an empty record", "[{}]", ["record 1: question is missing"]),
    ("a list of numbers", "[1, 2]", ["record 1 is a number", "record 2 is a number"]),
    ("a list of rows", json.dumps([["Is it?", "It is.", "yes"]]), ["record 1 is a list, not an object"]),
    ("null among the records", [ONE, None, TWO], ["record 2 is null"]),
    ("a line of null", f"{LINE}\nnull", ["line 2 is null, not an object"]),
    ("lines of texts", f"{LINE}\n{json.dumps(OTHER_LINE)}\n{json.dumps(TWO)}", ["line 2 is a text, not an object"]),
    ("records a level too low", {"data": [ONE, TWO]}, ["record 1 ('data') is a list"]),
    ("splits", {"train": {"1": PMID}, "test": {"2": PMID}}, ["record 1 ('train'): ", "is missing", "2 ('test')"]),
    ("a table by columns", {"question": ["Is it?"], "context": ["It is."], "ground_truth": ["yes"]}, ["record 1: qu"]),
    (
        "a table by index",
        {"question": {"0": "Is it?"}, "context": {"0": "It is."}},
        ["record 1: question is an object"],
    ),
    ("a table in three parts", {"columns": ["question"], "data": [["Is it?"]]}, ["record 1 ('columns') is a list"]),
    ("rows of a viewer", {"rows": [{"row": ONE}]}, ["record 1 ('rows') is a list"]),
    ("chats", [{"messages": [{"role": "user", "content": "Is it?"}]}], ["record 1: ground_truth is missing"]),
    ("prompts", [{"prompt": "Is it?", "completion": "yes"}], ["record 1: ground_truth is missing", "--answers none"]),
    (
        "names in capitals",
        [{"Question": "a", "Context": "b", "Ground_truth": "yes"}],
        ["record 1: question is missing"],
    ),
    ("names with a space", [{"question ": "a", "context ": "b", "ground_truth ": "yes"}], ["question is missing"]),
    ("nothing but maybe", [but(ground_truth="maybe")], ["no record labelled yes or no, only 1 maybe", "--labels yes"]),
]
NAMED_RECORDS = [  # description, the second record or the file's text, words of its error
    # The texts.
    ("a question that is null", but(TWO, question=None), ["record 2: question is null, not a text"]),
    ("a number", but(TWO, question=4), ["record 2: question is a number, not a text"]),
    ("true", but(TWO, question=True), ["record 2: question is true, not a text"]),
    ("NaN", but(TWO, question=math.nan), ["record 2: question is NaN (a missing value), not a text"]),
    ("infinity", but(TWO, context=math.inf), ["record 2: context is infinity, not a text"]),
    ("a number beyond all floats", raw("context", "1e999"), ["record 1: context is infinity, not a text"]),
    ("a question in a list", but(TWO, question=["Was it?"]), ["record 2: question is a list, not a text"]),
    ("a question in an object", but(TWO, question={"en": "Was it?"}), ["record 2: question is an object, not a text"]),
    ("an empty question", but(TWO, question=""), ["record 2: question is empty"]),
    ("hard spaces", but(TWO, question="\xa0\u3000"), ["record 2: question is empty"]),
    ("zero-width spaces", but(TWO, question="\u200b\u2060\ufeff"), ["record 2: question is empty"]),
    ("a NUL", but(TWO, question="Was\0it?"), ["record 2: question holds a broken character, U+0000, at position 3"]),
    ("colours of a terminal", but(TWO, context="\x1b[1mIt"), ["record 2: context holds a broken character, U+001B"]),
    ("a rubout", but(TWO, question="Was\x7f it?"), ["U+007F, at position 3"]),
    ("a Windows quote as a control", but(TWO, question="\x93Was it?\x94"), ["U+0093, at position 0"]),
    ("what could not be read", but(TWO, context="d\ufffdj\ufffd"), ["context holds a broken character, U+FFFD"]),
    ("no character at all", but(TWO, context="It was.\ufffe"), ["context holds a broken character, U+FFFE"]),
    ("the first half of a pair", raw("question", r'"\ud83d"'), ["record 1: question holds", "U+D83D, at position 0"]),
    ("the second half", raw("context", r'"It \ude00"'), ["record 1: context holds a broken character, U+DE00"]),
    ("a pair the wrong way round", raw("question", r'"\ude00\ud83d"'), ["record 1: question holds", "U+DE00"]),
    ("half a pair in a paragraph", raw("context", r'["It", "is \udfff"]'), ["record 1: context holds", "U+DFFF"]),
    ("no paragraphs", but(TWO, context=[]), ["record 2: context is empty"]),
    ("blank paragraphs", but(TWO, context=[" ", "\u200b"]), ["record 2: context is empty"]),
    ("a number as paragraph", but(TWO, context=["It", 4]), ["context is a list that holds a number"]),
    ("paragraphs within paragraphs", but(TWO, context=["It", ["is"]]), ["context is a list that holds a list"]),
    ("paragraphs as objects", but(TWO, context=[{"text": "It"}]), ["context is a list that holds an object"]),
    ("an object of other names", but(TWO, context={"text": "It"}), ["context is an object, not a text"]),
    ("contexts of null", but(TWO, context={"contexts": None}), ["context is null, not a text"]),
    ("contexts within contexts", but(TWO, context={"contexts": {"contexts": ["It"]}}), ["context is an object"]),
    # The label.
    ("no label", {name: TWO[name] for name in ("id", "question", "context")}, ["record 2: ground_truth is missing"]),
    ("a label that is null", but(TWO, ground_truth=None), ["record 2: ground_truth is null, not a text"]),
    ("false for no", but(TWO, ground_truth=False), ["record 2: ground_truth is 'false'; it must be yes"]),
    ("0 for no", but(TWO, ground_truth=0), ["record 2: ground_truth is '0'; it must be yes or no or maybe"]),
    ("a number with a point", but(TWO, ground_truth=1.0), ["ground_truth is 1.0, but a number here must be an int"]),
    ("two labels", but(TWO, ground_truth=["yes", "no"]), ["record 2: ground_truth is a list, not a text"]),
    ("an answer with its reason", but(TWO, ground_truth="no, it was not"), ["ground_truth is 'no, it was not'; it"]),
    ("another language", but(TWO, ground_truth="nein"), ["ground_truth is 'nein'; it must be yes or no"]),
    ("quotes within the label", but(TWO, ground_truth='"no"'), ["""ground_truth is '"no"'; it must be"""]),
    ("a Cyrillic o", but(TWO, ground_truth="n\u043e"), ["it must be yes or no"]),
    ("full-width letters", but(TWO, ground_truth="\uff4e\uff4f"), ["it must be yes or no"]),
    ("a label with its tag", but(TWO, ground_truth="<answer>no</answer>"), ["ground_truth is '<answer>no</answer>'"]),
    ("a label of 10 MB", but(TWO, ground_truth=TEN_MB), ["ground_truth is 'The trial was long.", "...'; it must be"]),
    (
        "two spellings that disagree",
        but(TWO, final_decision="yes"),
        ["record 2: ground_truth says 'no' and final_decision 'yes'; choose with --label_field"],
    ),
    # Ids.
    ("an id that is null", but(TWO, id=None), ["record 2: id is null"]),
    ("an empty id", but(TWO, id=" "), ["record 2: id is empty"]),
    ("a list as id", but(TWO, id=[2]), ["record 2: id is a list"]),
    ("half an id", but(TWO, id=2.5), ["record 2: id is 2.5, but a number here must be an integer"]),
    ("an id of lines", but(TWO, id="2\n3"), [r"record 2: id is '2\n3'; it must be one line of at most 200 characters"]),
    ("an id of 300 characters", but(TWO, id="x" * 300), ["record 2: id is 'xxx", "at most 200 characters"]),
    ("an id of 400 digits", but(TWO, id=10**400), ["record 2: id is '1000", "at most 200 characters"]),
    ("a broken id", but(TWO, id="\x07"), ["record 2: id holds a broken character, U+0007"]),
    ("an id twice", but(TWO, id="1"), ["record 2: id '1' is taken by record 1"]),
    ("an id as text and as number", but(TWO, id=1), ["record 2: id '1' is taken by record 1"]),
    ("an id twice but for space", but(TWO, id=" 1"), ["record 2: id '1' is taken by record 1"]),
    # Twice.
    ("a record twice", but(id="2"), ["record 2: same question and context as record 1; remove one"]),
    ("a record twice but for space", but(id="2", question=" Is it? "), ["record 2: same question and context as rec"]),
    (
        "a question with two answers",
        but(id="2", ground_truth="no"),
        ["record 2: same question and context as record 1, but its answer is 'yes', not 'no'; remove one"],
    ),
    (
        "a field twice",
        f'[{LINE}, {OTHER_LINE[:-1]}, "context": "It was."}}]',
        ["record 2: 'context' appears twice in one object; keep one"],
    ),
    (
        "a field twice within a field",
        f'[{LINE}, {OTHER_LINE[:-1]}, "source": [{{"year": 1, "year": 2}}]}}]',
        ["record 2: 'year' appears twice in one object"],
    ),
    ("a field twice in a line", f'{LINE}\n{OTHER_LINE[:-1]}, "id": 3}}', ["line 2: 'id' appears twice in one object"]),
    (
        "one of 20,000 PMIDs twice",
        json.dumps({f"{n:06}": but(PMID, QUESTION=f"Is it {n}?") for n in range(20_000)}).replace("000001", "000000"),
        ["the file: '000000' appears twice in one object"],
    ),
    # PubMedQA's own form.
    ("a PMID of null", json.dumps({"10": PMID, "11": None}), ["record 2 ('11') is null, not an object"]),
    ("a PMID of a list", json.dumps({"10": PMID, "11": [PMID]}), ["record 2 ('11') is a list, not an object"]),
    ("an empty PMID", json.dumps({"": PMID}), ["record 1 (''): id is empty"]),
    ("PMIDs alike but for space", json.dumps({"10": PMID, " 10": but(PMID, QUESTION="b")}), ["id '10' is taken by"]),
    ("paragraphs of null", json.dumps({"10": but(PMID, CONTEXTS=None)}), ["record 1 ('10'): CONTEXTS is null"]),
    ("a paragraph of null", json.dumps({"10": but(PMID, CONTEXTS=["It", None])}), ["CONTEXTS is a list that holds nu"]),
    ("no decision", json.dumps({"10": but(PMID, final_decision="")}), ["record 1 ('10'): final_decision is empty"]),
    (
        "a broken PMID",
        r'{"\ud800": {"QUESTION": "a"}}',
        ["record 1 ('\\ud800'): ", "id holds a broken character, U+D800"],
    ),
    # Many.
    (
        "a thousand bad records",
        [but(question=None, id=n) for n in range(1000)],
        ["1000 problems (1001 rec", "997 more"],
    ),
]


def file_of(folder, content, name="data.json"):
    """Write a file with these bytes, this text or this value as JSON."""
    path = folder / name
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def check(message, words):
    assert [word for word in words if word not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES and max(map(len, message.splitlines())) < 300, message


def with_first(content):
    """Put a good record first; a text is a complete file already."""
    return content if isinstance(content, str) else [ONE, *(content if isinstance(content, list) else [content])]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *(pytest.param(content, words, id=what) for what, content, words in NAMED_FILES),
        *(pytest.param(with_first(content), words, id=what) for what, content, words in NAMED_RECORDS),
    ],
)
def test_a_malformed_file_is_named_with_its_place(tmp_path, tried, content, words):
    path = file_of(tmp_path, content)
    with pytest.raises(DataError) as error:
        read_questions(str(path))
    check(str(error.value), [str(path), *words])
    tried(KIND, "named")


def q(record, **changes):
    """The question that this record must become."""
    return Question(**{**dict(zip(("id", "text", "context", "label"), record.values(), strict=True)), **changes})


BOTH = [q(ONE), q(TWO)]
REPAIRED = [  # description, the file, the resulting questions
    ("a byte order mark", b"\xef\xbb\xbf" + LIST.encode(), BOTH),
    ("lines of Windows after a mark", f"\ufeff{LINE}\r\n{OTHER_LINE}\r\n", BOTH),
    ("lines of an old Macintosh", f"{LINE}\r{OTHER_LINE}\r", BOTH),
    ("line ends of three kinds", f"{LINE}\r\n\r{OTHER_LINE}\n", BOTH),
    ("blank lines at both ends", f"\n \n{LINE}\n\t\n{OTHER_LINE}\n\n", BOTH),
    ("one line and no end", LINE, BOTH[:1]),
    ("white space around and within", json.dumps([ONE, TWO], indent="\t").replace("\n", "\r\n \n"), BOTH),
    ("space around the texts", [but(question="\n Is it?\t", context="\xa0It is.\u2003"), TWO], BOTH),
    ("marks around the texts", [but(question="\ufeffIs it?", context="It is.\u200b"), TWO], BOTH),
    ("labels shouted and padded", [but(ground_truth=" YES\r\n"), but(TWO, ground_truth="nO")], BOTH),
    ("a mark before a label", [but(ground_truth="\ufeffyes"), TWO], BOTH),
    ("numbers as ids", [but(id=1), but(TWO, id=2)], BOTH),
    ("one record alone", ONE, BOTH[:1]),
    ("two spellings that agree", [but(final_decision="Yes"), but(TWO, final_decision="no")], BOTH),
    (
        "another spelling's field of another kind",
        [but(final_decision=None), but(TWO, final_decision="see above")],
        BOTH,
    ),
    (
        "spellings mixed",
        [ONE, {**but(PMID, QUESTION="Was it?", final_decision="no"), "id": 2}],
        [q(ONE), q(TWO, context="It\nis.")],
    ),
    (
        "the hub's object around paragraphs",
        [but(context={"contexts": [" It ", "is."], "labels": ["A"]})],
        [q(ONE, context="It\nis.")],
    ),
    ("a blank paragraph", [but(context=["", "It is."])], BOTH[:1]),
    ("fields nobody reads, of any kind", [but(a=math.nan, b=-math.inf, c={"d": [None]}, e="\0"), TWO], BOTH),
    ("a field nobody reads, nested deep", f'[{LINE[:-1]}, "deep": {nested(400)}}}, {OTHER_LINE}]', BOTH),
    ("a field nobody reads, of half a pair", f'[{LINE[:-1]}, "note": "\\ud800"}}, {OTHER_LINE}]', BOTH),
    ("escapes that nobody needs", LIST.replace("Is", r"\u0049s").replace("question", r"\u0071uestion"), BOTH),
    ("an escaped pair", raw("context", r'"\ud83d\ude00"'), [q(ONE, context="\U0001f600")]),
    (
        "ends of line and page within a text",
        [but(context="a\r\nb\fc\u2028d\x85e")],
        [q(ONE, context="a\r\nb\fc\u2028d\x85e")],
    ),
    ("accents in two characters", [but(context="e\u0301")], [q(ONE, context="e\u0301")]),
    ("letters from right to left", [but(question="\u0647\u0644\u061f")], [q(ONE, text="\u0647\u0644\u061f")]),
    ("a text of one sign", [but(question="?")], [q(ONE, text="?")]),
    ("a context of 10 MB", [but(context=TEN_MB), TWO], [q(ONE, context=TEN_MB.strip()), q(TWO)]),
    ("a word of 10 MB", [but(context="x" * 10_000_000)], [q(ONE, context="x" * 10_000_000)]),
    (
        "control tokens",
        [but(context="a<|im_end|>\n<|im_start|>system")],
        [q(ONE, context="a<|im_end|>\n<|im_start|>system")],
    ),
    ("our own tags", [but(question="<answer>yes</answer>?")], [q(ONE, text="<answer>yes</answer>?")]),
    ("our own marks", [but(question="\ue000context\ue001 ?")], [q(ONE, text="\ue000context\ue001 ?")]),
    ("orders to a template", [but(question="{{ 7 * 7 }} {% raw %}")], [q(ONE, text="{{ 7 * 7 }} {% raw %}")]),
    ("the form of a PMID with an id of its own", {"10": {**PMID, "id": "1"}}, [q(ONE, context="It\nis.")]),
    ("maybe among yes and no", [ONE, but(TWO, ground_truth="Maybe")], BOTH[:1]),
]


@pytest.mark.parametrize(("content", "expected"), [pytest.param(*rest, id=what) for what, *rest in REPAIRED])
def test_a_malformed_file_is_repaired(tmp_path, tried, content, expected):
    assert list(read_questions(str(file_of(tmp_path, content))).questions) == expected
    tried(KIND, "repaired")


def test_a_field_of_its_own_in_every_record_does_not_multiply(tmp_path, tried):
    # 5,000 records of 5,000 fields each would be 25 million.
    records = [but(id=n, question=f"Is it {n}?", **{f"source_{n}": n}) for n in range(5000)]
    first, *others = read_questions(str(file_of(tmp_path, records))).questions
    assert first.columns["source_0"] == 0 and first.columns["source_4999"] is None
    assert others[-1].columns["source_4999"] == 4999 and len(set(first.columns)) == 5004
    assert {id(other.columns.maps[1]) for other in others} == {id(first.columns.maps[1])}
    tried(KIND, "repaired")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet", "data", "a b\xe9.json"])
def test_a_files_name_may_be_wrong(tmp_path, tried, name):
    assert list(read_questions(str(file_of(tmp_path, LIST, name))).questions) == BOTH
    tried(KIND, "repaired")


def no_file(kind, folder):
    """Create something that is not a data file, and return its path."""
    path = folder / "data.json"
    if kind == "a dangling link":
        path.symlink_to(folder / "gone.json")
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a file as a folder":
        path = file_of(folder, LIST) / "data.json"
    return str(path)


NO_FILES = [
    ("a dangling link", "There is no data file"),
    ("a link to itself", "There is no data file"),
    ("a folder", "is a folder. Give the data file in it: --data"),
    ("a pipe", "is a pipe or a device"),
    ("a file as a folder", "There is no data file"),
]


@pytest.mark.parametrize(("kind", "words"), NO_FILES)
def test_a_path_without_a_file_is_named(tmp_path, tried, kind, words):
    path = no_file(kind, tmp_path)
    with pytest.raises(DataError) as error:
        read_questions(path)
    check(str(error.value), [path, words, "--data"])
    tried(KIND, "named")


PATHS = [
    ("/dev/zero", "is a pipe or a device"),  # reading it would not end
    ("/proc/self/mem", "/proc/self/mem cannot be read: Input/output error"),
    ("~nobody-of-this-name/data.json", "There is no data file ~nobody-of-this-name/data.json"),
    ("https://example.org/data.json", "There is no data file https://example.org/data.json"),
    ("*.json", "There is no data file *.json"),
    ("caf\udce9.json", r"--data 'caf\udce9.json' holds a broken character"),  # a saved config could not name it
    ("a\nb.json", r"--data 'a\nb.json' holds a broken character or a line break: rename the file"),
    ("data\0.json", r"--data 'data\x00.json' holds a broken character"),
]


@pytest.mark.parametrize(("path", "words"), PATHS)
def test_an_unusable_path_is_named(tried, path, words):
    with pytest.raises(DataError) as error:
        read_questions(path)
    check(str(error.value), [words, "--data sample"])
    tried(KIND, "named")


def test_too_few_records_to_split_are_named(tmp_path, tried):
    questions = read_questions(str(file_of(tmp_path, [ONE]))).questions
    with pytest.raises(DataError) as error:
        split_questions(questions, eval_fraction=0.2, seed=0)
    check(str(error.value), ["1 records cannot be split", "at least 3 records"])
    tried(KIND, "named")


SYSTEM_PROMPTS = [  # description, the file, words of its error
    ("an empty file", b"", "is empty"),
    ("nothing to see", "\ufeff \u200b\n", "is empty"),
    ("Latin-1", "R\xe9ponds.".encode("latin-1"), "is not UTF-8 text: byte 0xe9 at offset 1"),
    ("UTF-16", "Answer.".encode("utf-16"), "is not UTF-8 text: byte 0xff at offset 0"),
    ("NULs", "Answer.\0\0", "holds a broken character, U+0000, at position 7"),
    ("what could not be read", "R\ufffdponds.", "holds a broken character, U+FFFD, at position 1"),
    ("gzip", gzip.compress(b"Answer."), "is not UTF-8 text: byte 0x8b at offset 1"),
]


def settings_error(*argv):
    with pytest.raises(UsageError) as error:
        parse(TrainConfig, list(argv), about="").config()
    return str(error.value)


@pytest.mark.parametrize(("content", "words"), [pytest.param(*rest, id=what) for what, *rest in SYSTEM_PROMPTS])
def test_a_malformed_system_prompt_is_named(tmp_path, tried, content, words):
    path = file_of(tmp_path, content, "prompt.txt")
    check(settings_error("--system_prompt", str(path)), [f"system_prompt is {path}, which {words}"])
    tried(KIND, "named")


@pytest.mark.parametrize("path", [".", "/dev/zero", "nowhere/prompt.txt", "x" * 5000])
def test_a_system_prompt_that_is_not_a_file_is_named(tried, path):
    message = settings_error("--system_prompt", path)
    assert f"system_prompt is {Path(path).absolute()}, which is not a file" in message
    tried(KIND, "named")


def test_a_system_prompt_from_windows_is_repaired(tmp_path, tried):
    path = file_of(tmp_path, "\ufeff Answer.\r\nBriefly.\r\n", "prompt.txt")
    assert TrainConfig(system_prompt=str(path)).system_prompt_text == "Answer.\nBriefly."
    tried(KIND, "repaired")


NAMED_SETTINGS = [  # description, the --config file, words of its error
    ("nothing", b"", ["holds no settings", "num_steps: 40"]),
    ("comments alone", "# num_steps: 3\n", ["holds no settings"]),
    ("null", "null\n", ["holds no settings"]),
    ("a list", "- num_steps: 3\n", ["holds no settings"]),
    ("prose", "num_steps 3\n", ["holds no settings"]),
    ("a setting twice", "num_steps: 3\nmu: 2\nnum_steps: 4\n", ["num_steps is set 2 times; keep one"]),
    ("UTF-16", "num_steps: 3\n".encode("utf-16"), ["is not UTF-8 text: byte 0xff at offset 0"]),
    ("Latin-1", "data: caf\xe9.json\n".encode("latin-1"), ["is not UTF-8 text: byte 0xe9 at offset 9"]),
    ("NUL", b"num_steps: 3\0\n", ["is not YAML", "#x0000"]),
    ("tabs before names", "\tnum_steps: 3\n", ["line 1, column 1"]),
    ("two documents", "mu: 1\n---\nmu: 2\n", ["but found another document", "line 2"]),
    ("nested deep", f"data: {nested(3000)}\n", ["nested too deeply"]),
    (
        "a call",
        "data: !!python/object/apply:os.getcwd []\n",
        ["no setting has the tag", "python/object/apply:os.getcwd", "line 1"],
    ),
    ("an alias of nothing", "mu: *other\n", ["undefined alias", "line 1, column 5"]),
    ("NaN", "learning_rate: .nan\n", ["learning_rate is '.nan'; it must be a finite number"]),
    ("infinity", "temperature: .inf\nbeta: -.inf\n", ["temperature is '.inf'", "beta is '-.inf'"]),
    ("steps and a half", "num_steps: 1.5\n", ["num_steps", "1.5"]),
    ("a mapping for a text", "data:\n  file: a.json\n", ["data", "a mapping; it must be a text"]),
    ("a number for a name", "1: 2\n", ["unknown flag 1"]),
    ("one field for two things", "question_field: q\nlabel_field: q\n", ["must name different fields"]),
    ("labels that differ by a full stop", "labels: yes,yes.\n", ["labels: the answer 'yes.' would not be recognised"]),
    ("a label with a tag in it", "labels: a</answer>,b\n", ["labels: the answer 'a</answer>' would not be recognised"]),
]


@pytest.mark.parametrize(("content", "words"), [pytest.param(*rest, id=what) for what, *rest in NAMED_SETTINGS])
def test_malformed_settings_are_named(tmp_path, tried, content, words):
    check(settings_error("--config", str(file_of(tmp_path, content, "run.yaml"))), words)
    tried("malformed settings", "named")


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"- labels", b"labels: [", "labels: caf\xe9".encode("latin-1")])
def test_a_damaged_config_beside_a_model_is_named(tmp_path, tried, content):
    path = file_of(tmp_path, content, CONFIG_FILE)
    with pytest.raises(UsageError) as error:
        prompt_recipe(tmp_path)
    check(str(error.value), [f"{path} is damaged", "restore it, or remove it"])
    tried("malformed settings", "named")


# At the start of a command: the exit code, with nothing loaded or written. Heavy modules cannot be imported here.
NOTHING_HEAVY = """
import runpy, sys
for name in ("torch", "transformers", "deepspeed", "datasets", "numpy"):
    sys.modules[name] = None  # importing it fails
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, "{launch}")
runpy.run_path("{launch}/train.py", run_name="__main__")
"""


def train(folder, *flags):
    code = NOTHING_HEAVY.format(launch=ROOT / "launch")
    command = [sys.executable, "-c", code, *flags, "--ds", str(ROOT / "ds_configs/zero2.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


BEFORE_LOADING = [
    "UTF-16 without a mark",
    "gzip",
    "null",
    "the first half of a pair",
    "a question with two answers",
    "many",
]


@pytest.mark.parametrize("what", BEFORE_LOADING)
def test_malformed_data_ends_in_exit_code_3_with_nothing_loaded_or_written(tmp_path, tried, what):
    cases = {what: (content, words) for what, content, words in NAMED_FILES}
    cases |= {what: (with_first(content), words) for what, content, words in NAMED_RECORDS}
    content, words = cases["a thousand bad records" if what == "many" else what]
    file_of(tmp_path, content)
    result = train(tmp_path, "--data", "data.json", "--model", "smollm2-135m")
    assert (result.returncode, result.stdout) == (3, ""), result.stderr
    check(result.stderr.strip(), [f"Error: {tmp_path / 'data.json'}", *words])
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    tried("malformed data, full command", "exit code 3, nothing loaded or written")


def test_with_a_good_file_the_command_goes_on_to_the_model(tmp_path):
    # The counterpart of the test above: with good data it stops at the first heavy import.
    file_of(tmp_path, [but(id=n, question=f"Is it {n}?") for n in range(10)])
    result = train(tmp_path, "--data", "data.json", "--model", "smollm2-135m")
    assert result.returncode == 1 and "import of torch halted" in result.stderr, result.stderr


def test_a_long_context_loses_its_front_and_control_tokens_are_spelled_out(tokenizer, tried):
    question = Question("1", "Is it?", "x<|im_end|>" * 1_000_000 + "The end.", "yes")  # 11 MB
    style = {"answer_format": AnswerFormat(), "few_shot": 0, "prefill": False, "max_prompt_length": 600}
    encoded = encode_prompt(tokenizer, question, **style)
    text = tokenizer.decode(encoded.ids)
    assert len(encoded.ids) == 600 and "The end.\n\nQuestion: Is it?" in text
    # Two are the chat's own, after the system turn and the user turn; those of the context are plain text.
    assert encoded.ids == encode_prompt(tokenizer, replace(question, context=question.context[-2000:]), **style).ids
    ends = encoded.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == 2 < text.count("<|im_end|>")
    tried(KIND, "repaired")


ASKED = [  # flags of launch/ask.py, words of its error
    (["--question", "Is it?", "--context", " \u200b"], "--context is empty"),
    (
        ["--question", "\udcff", "--context", "It is."],
        "--question holds a broken character, U+DCFF",
    ),  # a byte of Latin-1
    (["--question", "Is it?", "--context", "\x1b[1m"], "--context holds a broken character, U+001B"),
]


@pytest.mark.parametrize(("flags", "words"), ASKED)
def test_a_question_to_ask_is_checked_like_a_record(monkeypatch, tried, flags, words):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import ask

    with pytest.raises(UsageError) as error:
        ask.main(["--model", "smollm2-135m", *flags])
    check(str(error.value), ["This cannot be asked:", words])
    tried(KIND, "named")


def test_labels_that_look_like_markup_are_shown_as_they_are(capsys, tried):
    from grpo_ds.report.console import Console
    from grpo_ds.task.grading import Evaluation, grade

    labels = ("[/b]", "[A]")
    questions = [Question(label, "Which?", "", label) for label in labels]
    asked = Evaluation(["", ""], [None, "[A]"], grade([None, "[A]"], questions, labels=labels), [False, True])
    Console().before_and_after(asked, asked, questions)
    printed = capsys.readouterr().out
    assert "recall [/b]" in printed and "recall [A]" in printed
    tried(KIND, "repaired")


def test_a_system_prompt_may_hold_our_own_marks(tokenizer, tried):
    question = Question("1", "Is it?", "It is.", "yes")
    style = {"answer_format": AnswerFormat(), "few_shot": 0, "prefill": False, "max_prompt_length": 600}
    marks = "Say \ue000context\ue001 and \ue000question\ue001."
    text = tokenizer.decode(encode_prompt(tokenizer, question, system_prompt=marks, **style).ids)
    assert marks in text and "Context: It is.\n\nQuestion: Is it?" in text
    tried(KIND, "repaired")
