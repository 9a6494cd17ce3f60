"""Files written beside and renamed."""

import os

import pytest

from grpo_ds.system.files import append_whole, replaced, write_whole

pytestmark = pytest.mark.faults("files written in place, links, modes")


def test_a_file_is_the_old_one_or_the_new_one_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "run_status.json"
    write_whole(file, "old")
    with pytest.raises(RuntimeError), replaced(file) as out:
        out.write(b"half")
        raise RuntimeError
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_whole(file, "new")
    assert file.read_text() == "old" and os.listdir(tmp_path) == [file.name]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("summary.json", ".summary.json.new"):  # the second is where it is written first
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "summary.json", "ours")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "summary.json").read_text() == "ours" and not (tmp_path / "summary.json").is_symlink()


def test_nothing_is_appended_through_a_link(tmp_path):
    append_whole(tmp_path / "metrics.jsonl", "1\n")
    (tmp_path / "link").symlink_to(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError):
        append_whole(tmp_path / "link", "2\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_has_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", "")
        append_whole(tmp_path / "b", "")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o666 & ~umask] * 2
