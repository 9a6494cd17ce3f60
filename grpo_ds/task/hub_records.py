"""Data sets of the hub as records, read by `datasets`: OWNER/NAME, OWNER/NAME:CONFIG, OWNER/NAME:CONFIG@SPLIT."""

import os
import re
from pathlib import Path

from grpo_ds.errors import DataError
from grpo_ds.system.hub import check_hub
from grpo_ds.task.json_records import Placed
from grpo_ds.task.parquet_records import table_records

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # OWNER/NAME, of a model or a data set
PART = re.compile(rf"(?P<id>{HUB_ID.pattern})(?::(?P<config>[\w.+-]+))?(?:@(?P<split>[\w.:%\[\]+-]+))?")
CONFIGS = {"qiaojin/pubmedqa": "pqa_labeled"}  # what is read without :CONFIG
SPLIT = "train"  # without @SPLIT
FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".yaml", ".gz", ".zip"}


def is_hub_id(data: str) -> bool:
    found = PART.fullmatch(data)
    looks_alike = found is not None and Path(found["id"]).suffix.lower() not in FILE_SUFFIXES
    return looks_alike and not os.path.isdir(os.path.dirname(data))


def hub_id(data: str) -> str:
    """Return the id alone: OWNER/NAME."""
    return data.partition("@")[0].partition(":")[0]


def hub_records(data: str) -> tuple[str, list[Placed]]:
    """Return (form, records); its rows are records in the hub's spelling. Raises DataError."""
    found = PART.fullmatch(data)
    if not found:
        raise ValueError(f"not a hub id: {data}")
    config = found["config"] or CONFIGS.get(found["id"].lower())
    split = found["split"] or SPLIT
    try:
        check_hub()
        from datasets import load_dataset  # heavy, and only hub ids need it

        rows = load_dataset(found["id"], config, split=split)
    except Exception as error:  # the hub's errors have no common type
        raise _hub_error(data, error) from error
    return f"hub data set, {f'config {config}, ' * bool(config)}split {split}", table_records(rows)


def _hub_error(data: str, error: Exception) -> DataError:
    reason = " ".join((str(getattr(error, "reason", error)).splitlines() or [type(error).__name__])[:3])[:200]
    return DataError(
        f"{data} is not a file here, and it could not be read as a hub data set:\n"
        f"  {reason}\n"
        f"Name another config or split: --data {hub_id(data)}:CONFIG@SPLIT (a split may be train[:1000]).\n"
        "Or use a file (--data FILE.json) or the packaged records (--data sample);\n"
        "set HF_HUB_OFFLINE=1 to use a copy that was downloaded before."
    )
