"""CSV as records: its first line names the columns, and the content says which character separates them.

Cells are texts. An empty one is a missing field, and one that holds JSON (a list of texts or objects, or an object)
is that value, so that options and chats fit into a table.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from grpo_ds.task.json_records import Placed
from grpo_ds.task.record_shapes import RECORD_NAMES
from grpo_ds.task.records import json_value, quote
from grpo_ds.task.spelling import nfc

DELIMITERS = (",", ";", "\t", "|")
NAMED = re.compile(r"sep=([^\s\w\"]|\t)\n")  # a first line that names the delimiter, as Excel reads and writes it
COLUMN = re.compile(r"[^\[\]{}<>\x00-\x1f]{0,80}")  # a name; longer texts and other formats have something else
TRIED = 500  # rows that decide between delimiters
NO_FIT = (False, -1.0, 0)
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'"}


@dataclass(frozen=True, slots=True)
class Row:
    """Cells of a row, or the reason why it cannot be read.

    Example: a text with a line break in it.
        >>> [row.place for row in _rows('a,b\\n1,"2\\n3"\\n', ",")]
        ['line 1', 'lines 2 to 3']
    """

    first_line: int
    last_line: int
    cells: list[str]
    fault: str = ""

    @property
    def place(self) -> str:
        first, last = self.first_line, self.last_line
        return f"line {first}" if first == last else f"lines {first} to {last}"


def csv_records(text: str) -> tuple[str, list[Placed], list[str], str] | None:
    """Return (form, records, problems, advice); None if the text is no table whose first line names its columns."""
    named = NAMED.match(text)
    line = text.lstrip("\n").partition("\n")[0]
    possible = [named[1]] if named else [it for it in DELIMITERS if it in line] or [DELIMITERS[0]]
    fits = {delimiter: _fit(text, delimiter) for delimiter in possible}
    delimiter = max(fits, key=lambda it: fits[it])
    if fits[delimiter] == NO_FIT and not named:
        return None
    rows = _rows(text, delimiter)
    first = next(rows, Row(1, 1, []))
    header = [nfc(name.strip()) for name in first.cells]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    problems = [f"{first.place}: {first.fault}"] if first.fault else []
    problems += [f"{first.place}: column {quote(name)} is there twice; keep one" for name in twice]
    records: list[Placed] = []
    for row in rows:
        if fault := row.fault or _width_fault(row.cells, header, delimiter):
            problems.append(f"{row.place}: {fault}")
        elif any(row.cells):
            records.append((row.place, _record(header, row.cells)))
    separated = NAMES.get(delimiter, repr(delimiter))
    advice = "The first line names the columns."
    if len(header) == 1 or len(problems) >= len(records):
        other = "," if delimiter == ";" else ";"
        advice += f" If {separated} do not separate them, put a line before it: sep={other}"
    return f"CSV with {separated}", records, problems, advice


def _fit(text: str, delimiter: str) -> tuple[bool, float, int]:
    """Rank a delimiter: by known column names, the share of rows as wide as the header, and its width."""
    header, *rows = [*islice(_rows(text, delimiter), TRIED)] or [Row(1, 1, [])]
    names = [nfc(name.strip()) for name in header.cells]
    if header.fault or not names or not all(map(COLUMN.fullmatch, names)) or not any(names):
        return NO_FIT
    known = not RECORD_NAMES.isdisjoint(names)
    fitting = sum(len(row.cells) == len(names) for row in rows) / max(1, len(rows))
    enough = known or (len(names) > 1 and rows and fitting >= 0.5)
    return (known, fitting, len(names)) if enough else NO_FIT


def _rows(text: str, delimiter: str) -> Iterator[Row]:
    """Yield every row that is not blank, with the lines that it takes; a broken one does not end the table."""
    start = text.index("\n") + 1 if NAMED.match(text) else 0
    skipped = 1 if start else 0
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a context may be longer than Python's 128 KiB
    reader = csv.reader(io.StringIO(text[start:], newline=""), delimiter=delimiter, strict=True)
    while True:
        before = reader.line_num
        cells, fault = [], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _fault(str(error))
        if cells or fault:
            yield Row(before + 1 + skipped, max(reader.line_num, before + 1) + skipped, cells, fault)


def _fault(said: str) -> str:
    if "unexpected end" in said:
        return 'a double quote opens a text here, and none closes it; one within a text is doubled ("")'
    if "expected after" in said:
        return 'a text goes on behind its closing double quote; one within a text is doubled ("")'
    return f"broken CSV, {said}"


def _width_fault(cells: list[str], header: list[str], delimiter: str) -> str:
    """Return what is wrong with the number of cells."""
    if len(cells) == len(header):
        return ""
    count = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
    around = f"; a text with {NAMES.get(delimiter, repr(delimiter))} or line breaks in it stands in double quotes"
    return f"{count}, but the first line names {len(header)} columns{around * (len(cells) > len(header))}"


def _record(header: list[str], cells: list[str]) -> dict[str, object]:
    # A column without a name is the row numbers that pandas writes.
    return {name: json_value(cell) for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
