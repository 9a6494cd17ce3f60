"""Sources of records: a file, the packaged sample or a hub data set, all read into one form.

A file's content, never its name, decides how it is read (a JSON list, PubMedQA's mapping of PMIDs, or lines).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from grpo_ds.errors import DataError
from grpo_ds.system.hub import check_hub
from grpo_ds.task.records import BROKEN, REQUIRED_NAMES, describe, quote
from grpo_ds.task.spelling import nfc

SAMPLE = "sample"
GOLDEN_FILE = "golden_dataset_pubmedqa_qwen2.5_pro_test_500.json"  # the default if it is in the working folder
HUB_CONFIGS = {"qiaojin/pubmedqa": "pqa_labeled"}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".yaml", ".gz", ".zip"}
ALTERNATIVES = f"Use a file (--data FILE.json), the packaged records (--data {SAMPLE}) or a hub id (qiaojin/PubMedQA)."
FOREIGN = {  # first bytes of a file that is not UTF-8 text -> its kind, what to do
    b"\xff\xfe\0\0": ("text in UTF-32", "Save it as UTF-8 (for instance: iconv -f UTF-32 -t UTF-8)."),
    b"\xff\xfe": ("text in UTF-16", "Save it as UTF-8 (for instance: iconv -f UTF-16 -t UTF-8)."),
    b"\xfe\xff": ("text in UTF-16", "Save it as UTF-8 (for instance: iconv -f UTF-16 -t UTF-8)."),
    b"\x1f\x8b": ("a gzip archive", "Unpack it first."),
    b"BZh": ("a bzip2 archive", "Unpack it first."),
    b"\xfd7zXZ": ("an xz archive", "Unpack it first."),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "Unpack it first."),
    b"PK\x03\x04": ("a zip archive or an office document", "Unpack it first, or export it as JSON."),
    b"PAR1": ("a Parquet table", "Export it as JSON first."),
    b"ARROW1": ("an Arrow table", "Export it as JSON first."),
    b"SQLite format 3": ("an SQLite database", "Export it as JSON first."),
    b"%PDF-": ("a PDF document", "Export it as JSON first."),
}
ACCEPTED = (
    'Records: {"question": "...", "context": "...", "ground_truth": "yes" or "no"},'
    " as a JSON list, one per line, or in PubMedQA's own form."
)


@dataclass(frozen=True, slots=True)
class Source:
    """Records as they were read, not yet checked.

    Example: two lines, the second one broken.
        >>> parse_file("data.jsonl", b'{"question": "Is it?"}\\n{oops}')  # doctest: +NORMALIZE_WHITESPACE
        Source(name='data.jsonl', records=(('line 1', {'question': 'Is it?'}),),
               problems=('line 2: broken JSON, column 2: Expecting property name enclosed in double quotes',))
    """

    name: str  # the file, hub id or "sample"
    records: tuple[tuple[str, object], ...]  # (place, JSON value); a place is "record 3" or "line 3"
    problems: tuple[str, ...] = ()  # everything that could not be read as a record, with its place


def data_or_default(data: str | None) -> str:
    """Return --data, or the default for the working folder."""
    return data if data is not None else os.path.abspath(GOLDEN_FILE) if os.path.exists(GOLDEN_FILE) else SAMPLE


def open_source(data: str | None) -> Source:
    """Find and read the source that --data names. Raises DataError."""
    data = data_or_default(data)
    if data == SAMPLE:
        return parse_file(SAMPLE, resources.files("grpo_ds.task").joinpath("sample.json").read_bytes())
    if BROKEN.search(data) or len(data.splitlines()) > 1:  # the saved config could not contain it
        raise DataError(f"--data {data!r} holds a broken character or a line break: rename the file.\n{ALTERNATIVES}")
    if os.path.exists(data):
        return parse_file(data, _read_bytes(data))
    if is_hub_id(data):
        return _read_hub(data)
    raise DataError(f"There is no data file {data} (in {os.getcwd()}).\n{ALTERNATIVES}")


def parse_file(name: str, content: bytes) -> Source:
    """Read records from the bytes of a file; its name does not matter. Raises DataError."""
    text = _decode(name, content)
    if not text.strip():
        raise DataError(f"{name} is empty.\n{ACCEPTED}")
    repeated: list[tuple[dict, str]] = []
    try:
        value = _loads(text, repeated)
    except json.JSONDecodeError as error:
        if _looks_like_lines(text):
            return _parse_lines(name, text)
        raise DataError(f"{name} is not valid JSON: {_position(error)}.\nFix it there. {ACCEPTED}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as JSON: {_reason(error)}.\n{ACCEPTED}") from None
    records = tuple(_numbered(name, value))
    return Source(name, records, tuple(_repetitions(records, repeated)))


def is_hub_id(data: str) -> bool:
    looks_alike = HUB_ID.fullmatch(data) is not None and Path(data).suffix.lower() not in FILE_SUFFIXES
    return looks_alike and not os.path.isdir(os.path.dirname(data))


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


def _decode(name: str, content: bytes) -> str:
    """Decode UTF-8 and turn every line end into a line feed: in JSON, carriage returns occur only between values."""
    for beginning, (kind, remedy) in FOREIGN.items():
        if content.startswith(beginning):
            raise DataError(f"{name} is not UTF-8 text: it begins like {kind}.\n{remedy}")
    if b"\0" in content:
        raise DataError(
            f"{name} is not UTF-8 text: NUL byte at offset {content.index(0)}, as in UTF-16 and in binary files.\n"
            "Save it as UTF-8 (for instance: iconv -f UTF-16LE -t UTF-8)."
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}.\n"
            "Save it as UTF-8 (for instance: iconv -f LATIN1 -t UTF-8), unpacked if it is an archive."
        ) from None


def _loads(text: str, repeated: list[tuple[dict, str]]) -> object:
    """Parse JSON with names in NFC, and add to `repeated` those that appear twice in one object.

    JSON keeps only the last value of a name; flags and the parameters of reward functions are compared with names.
    """

    def note_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
        as_dict = {nfc(name): value for name, value in pairs}
        if len(as_dict) < len(pairs):
            counts = Counter(nfc(name) for name, _ in pairs)
            repeated.extend((as_dict, name) for name in as_dict if counts[name] > 1)
        return as_dict

    return json.loads(text, object_pairs_hook=note_repeated)


def _numbered(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield (place, record) from a JSON value: a list, PubMedQA's mapping, or a single record."""
    if isinstance(value, dict) and REQUIRED_NAMES.isdisjoint(value) and not _is_flat(value):
        for number, (key, record) in enumerate(value.items(), start=1):
            if isinstance(record, dict):
                record.setdefault("id", key)
            yield f"record {number} ({quote(key)})", record
    elif isinstance(value, list | dict):
        for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
            yield f"record {number}", record
    else:
        raise DataError(f"{name} holds {describe(value)}, not records.\n{ACCEPTED}")


def _is_flat(value: dict) -> bool:
    # A single record with other field names; a mapping of PMIDs holds objects.
    return bool(value) and not any(isinstance(part, dict | list) for part in value.values())


def _looks_like_lines(text: str) -> bool:
    # In JSON Lines at least half of the lines begin an object; in an indented JSON file few do. A list is never lines.
    if text.lstrip().startswith("["):
        return False
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(line.startswith("{") for line in lines) >= len(lines) / 2


def _parse_lines(name: str, text: str) -> Source:
    """Read one JSON value per line; a broken line becomes a problem, and reading continues."""
    records, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold U+2028
        if not line.strip():
            continue
        repeated: list[tuple[dict, str]] = []
        try:
            records.append((f"line {number}", _loads(line, repeated)))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: broken JSON, {_reason(error)}")
            continue
        problems.extend(_repetitions(records[-1:], repeated))
    return Source(name, tuple(records), tuple(problems))


def _repetitions(records: Sequence[tuple[str, object]], repeated: list[tuple[dict, str]]) -> list[str]:
    """Describe each name that appears twice, with its record; outside all records it is a key of the file's mapping."""
    places = {id(part): place for place, record in records for part in _objects(record)} if repeated else {}
    return [
        f"{places.get(id(part), 'the file')}: {quote(name)} appears twice in one object; keep one"
        for part, name in repeated
    ]


def _objects(value: object) -> Iterator[object]:
    """Yield a JSON value and every value inside it."""
    waiting = [value]
    while waiting:
        yield (part := waiting.pop())
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _position(error: json.JSONDecodeError) -> str:
    return f"line {error.lineno}, column {error.colno}: {error.msg}"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _read_hub(hub_id: str) -> Source:
    """Read a hub data set with `datasets`; its rows are records in the hub's spelling."""
    try:
        check_hub()
        from datasets import load_dataset  # heavy, and only hub ids need it

        rows = load_dataset(hub_id, HUB_CONFIGS.get(hub_id.lower()), split="train")
    except Exception as error:  # the hub's errors have no common type
        raise _hub_error(hub_id, error) from error
    return rows_to_source(hub_id, rows)


def rows_to_source(name: str, rows: Iterable[Mapping]) -> Source:
    """Turn rows of a table into records, numbered from 1, with names in NFC."""
    records = ({nfc(column): value for column, value in row.items()} for row in rows)
    return Source(name, tuple((f"record {number}", record) for number, record in enumerate(records, start=1)))


def _hub_error(hub_id: str, error: Exception) -> DataError:
    reason = (str(getattr(error, "reason", error)).splitlines() or [type(error).__name__])[0][:160]
    return DataError(
        f"{hub_id} is not a file here, and it could not be read as a hub data set:\n"
        f"  {reason}\n"
        f"Use a file (--data FILE.json) or the packaged records (--data {SAMPLE});\n"
        "set HF_HUB_OFFLINE=1 to use a copy that was downloaded before."
    )
