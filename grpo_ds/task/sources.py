"""Sources of records: a file, the packaged sample or a hub data set, all read into one form.

A file's content, never its name, decides how it is read: JSON, JSON Lines, CSV or Parquet.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from grpo_ds.errors import DataError
from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.csv_records import csv_records
from grpo_ds.task.decoding import decode
from grpo_ds.task.hub_records import hub_records, is_hub_id
from grpo_ds.task.json_records import NoRecords, json_records, reason, where_broken
from grpo_ds.task.parquet_records import MAGIC, parquet_records, table_records
from grpo_ds.task.records import BROKEN

SAMPLE = "sample"
RECORDS = "records from Python"  # in place of --data: a script passed them to grpo_ds.train
GOLDEN_FILE = "golden_dataset_pubmedqa_qwen2.5_pro_test_500.json"  # the default if it is in the working folder
ALTERNATIVES = f"Use a file (--data FILE.json), the packaged records (--data {SAMPLE}) or a hub id (qiaojin/PubMedQA)."
FORMS = "as JSON, JSON Lines, CSV or Parquet"
EXAMPLES: dict[AnswerKind, str] = {  # a record that works
    "labels": f'Records: {{"question": "...", "context": "...", "ground_truth": "yes" or "no"}}, {FORMS} '
    "(docs/data.md).",
    "number": f'Records: {{"question": "...", "answer": "42", or "...\\n#### 42" as in GSM8K}}, {FORMS}.',
    "text": f'Records: {{"question": "...", "answer": "a text", or a list of accepted texts}}, {FORMS}.',
    "none": f'Records: {{"prompt": "..."}}, or turns {{"role", "content"}} as "prompt" or "messages", {FORMS}.',
}


@dataclass(frozen=True, slots=True)
class Source:
    """Records as they were read, not yet checked.

    Example: two lines, the second one broken.
        >>> parse_file("data.jsonl", b'{"question": "Is it?"}\\n{oops}')  # doctest: +NORMALIZE_WHITESPACE
        Source(name='data.jsonl', records=(('line 1', {'question': 'Is it?'}),),
               problems=('line 2: broken JSON, column 2: Expecting property name enclosed in double quotes',),
               form='JSON Lines', advice='')
    """

    name: str  # the file, hub id or "sample"
    records: tuple[tuple[str, object], ...]  # (place, JSON value); a place is "record 3" or "line 3"
    problems: tuple[str, ...] = ()  # everything that could not be read as a record, with its place
    form: str = ""  # of the file: "JSON Lines"
    advice: str = ""  # what to do if the form was guessed wrong


def data_or_default(data: str | None) -> str:
    """Return --data, or the default for the working folder."""
    return data if data is not None else os.path.abspath(GOLDEN_FILE) if os.path.exists(GOLDEN_FILE) else SAMPLE


def open_source(data: str | None, answers: AnswerKind = "labels") -> Source:
    """Find and read the source that --data names; errors show a record with such answers. Raises DataError."""
    data = data_or_default(data)
    if data == SAMPLE:
        return parse_file(SAMPLE, resources.files("grpo_ds.task").joinpath("sample.json").read_bytes())
    if BROKEN.search(data) or len(data.splitlines()) > 1:  # the saved config could not contain it
        raise DataError(f"--data {data!r} holds a broken character or a line break: rename the file.\n{ALTERNATIVES}")
    if os.path.exists(data):
        return parse_file(data, _read_bytes(data), answers)
    if is_hub_id(data):
        form, records = hub_records(data)
        return Source(data, tuple(records), form=form)
    raise DataError(f"There is no data file {data} (in {os.getcwd()}).\n{ALTERNATIVES}")


def parse_file(name: str, content: bytes, answers: AnswerKind = "labels") -> Source:
    """Read records from the bytes of a file; its name does not matter. Raises DataError, with a record of this kind."""
    example = EXAMPLES[answers]
    if content.startswith(MAGIC):
        records, problems = parquet_records(name, content)
        return Source(name, tuple(records), tuple(problems), "Parquet")
    text = decode(name, content)
    if not text.strip():
        raise DataError(f"{name} is empty.\n{example}")
    try:
        found = json_records(text)
    except NoRecords as other:
        raise DataError(f"{name} holds {other}, not records.\n{example}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as JSON: {reason(error)}.\n{example}") from None
    table = None if found else csv_records(text)
    if found:
        return Source(name, tuple(found[1]), tuple(found[2]), found[0])
    if table:
        return Source(name, tuple(table[1]), tuple(table[2]), table[0], table[3])
    place = f"{name} is not valid JSON: {where_broken(text)}."
    if text.lstrip().startswith(("[", "{")):
        raise DataError(f"{place}\nFix it there. {example}")
    columns = (
        "the first line names the columns, parted by commas, semicolons, tabs or |, or by what sep=^ before it says"
    )
    raise DataError(f"{place}\nNor is it CSV: {columns}.\n{example}")


def rows_to_source(name: str, rows: Iterable[Mapping]) -> Source:
    """Return the rows of a table as a source."""
    return Source(name, tuple(table_records(rows)), form="rows of records")


def _read_bytes(path: str) -> bytes:
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder. Give the data file in it: --data {os.path.join(path, 'FILE.json')}.")
    if not os.path.isfile(path):
        raise DataError(
            f"{path} is a pipe or a device: it can be read only once, but every rank and evaluation reads the data.\n"
            f"{ALTERNATIVES}"
        )
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.\n{ALTERNATIVES}") from None
