"""The record of what a model was trained on, beside the model."""

import pytest

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.run_folder.trained_on import TRAINED_ON_FILE, read_trained_on, write_trained_on

KNOWN = {"0123456789ab", "fedcba987654"}


def test_what_was_written_is_read_and_takes_13_bytes_a_question(tmp_path):
    assert read_trained_on(tmp_path) is None  # not recorded is not the same as nothing
    write_trained_on(tmp_path, [*KNOWN, *KNOWN])
    assert read_trained_on(tmp_path) == KNOWN
    assert (tmp_path / TRAINED_ON_FILE).stat().st_size == 13 * len(KNOWN)


@pytest.mark.parametrize("content", [b"0123456789ab", b"0123456789a\n", b"{}", b"\xff\n", b"0123456789AB\n"])
def test_a_damaged_record_is_named_and_never_read_as_an_empty_one(tmp_path, content):
    (tmp_path / TRAINED_ON_FILE).write_bytes(content)
    with pytest.raises(UsageError, match=r"trained_on\.txt is damaged") as caught:
        read_trained_on(tmp_path)
    assert len(str(caught.value).splitlines()) <= MAX_LINES
