"""Parquet as records, read by pyarrow, which comes with `datasets`. A missing value is a missing field."""

from collections.abc import Iterable, Mapping
from typing import Any

from grpo_ds.errors import DataError, in_one_line
from grpo_ds.task.json_records import Placed
from grpo_ds.task.spelling import nfc

MAGIC = b"PAR1"  # the first bytes of a file


def parquet_records(name: str, content: bytes) -> tuple[list[Placed], list[str]]:
    """Return (records, problems). Raises DataError for a file that pyarrow cannot read."""
    import pyarrow  # heavy, and only such files need it
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        rows = table.to_pylist(maps_as_pydicts="strict") if len({*table.column_names}) == table.num_columns else []
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{name} begins like a Parquet table, but it cannot be read: {in_one_line(error).rstrip('.')}.\n"
            "It may be cut off or damaged: write or download it again."
        ) from None
    columns = [nfc(column) for column in table.column_names]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    return table_records(rows), [f"the table: column {column!r} is there twice; keep one" for column in twice]


def table_records(rows: Iterable[Mapping[str, Any]]) -> list[Placed]:
    """Return the rows of a table as records, numbered from 1, with names in NFC and without missing values."""
    return [(f"record {number}", _present(row)) for number, row in enumerate(rows, start=1)]


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {nfc(column): value for column, value in row.items() if value is not None}
