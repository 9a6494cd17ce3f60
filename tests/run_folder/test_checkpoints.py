"""Checkpoint folders: complete or absent, found again, and never deleted too early. Files only, no model."""

import json
import os
from pathlib import Path

import pytest

from grpo_ds.errors import CheckpointError
from grpo_ds.run_folder import checkpoints as files
from grpo_ds.run_folder.resume import to_resume


def make(run, step, content="weights", where="global_step/shard.pt"):
    partial = files.partial_of(run, step)
    files.begin(partial)
    (partial / where).parent.mkdir(parents=True, exist_ok=True)
    (partial / where).write_text(content)
    (partial / "trainer_state.json").write_text("{}")
    return files.finish(partial)


def test_a_finished_checkpoint_is_whole_and_nothing_else_is_left(tmp_path):
    folder = make(tmp_path, 5)
    assert folder == tmp_path / "checkpoint-5" and files.damage(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    listed = json.loads((folder / files.MANIFEST).read_text())["files"]
    assert listed.keys() == {"global_step/shard.pt", "trainer_state.json"}


DAMAGES = {
    "global_step/shard.pt has been changed": lambda f: (f / "global_step/shard.pt").write_text("Weights"),
    "global_step/shard.pt has 3 bytes instead of 7": lambda f: (f / "global_step/shard.pt").write_text("wei"),
    "trainer_state.json is missing": lambda f: (f / "trainer_state.json").unlink(),
    "MANIFEST.json is missing": lambda f: (f / "MANIFEST.json").unlink(),
    "MANIFEST.json has been changed": lambda f: (f / "MANIFEST.json").write_text(
        (f / "MANIFEST.json").read_text().replace("shard", "shart")
    ),
    "MANIFEST.json cannot be read": lambda f: (f / "MANIFEST.json").write_text("[]"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damage_is_named(tmp_path, words):
    folder = make(tmp_path, 5)
    DAMAGES[words](folder)
    assert files.damage(folder).startswith(words)


def test_one_of_the_same_step_is_replaced(tmp_path):
    make(tmp_path, 5, "before")
    folder = make(tmp_path, 5, "after")
    assert (folder / "global_step/shard.pt").read_text() == "after" and files.damage(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_auto_takes_the_newest_whole_one_and_says_what_it_passed_over(tmp_path):
    make(tmp_path, 5)
    (make(tmp_path, 10) / "trainer_state.json").write_text("{ ")
    (tmp_path / "checkpoint-99.partial").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    origin, warnings = to_resume("auto", tmp_path)
    assert origin == tmp_path / "checkpoint-5"
    assert len(warnings) == 1 and "checkpoint-10 is damaged: trainer_state.json" in warnings[0]
    assert to_resume(str(tmp_path), None)[0] == origin
    assert to_resume(str(tmp_path / "checkpoint-10"), None)[0] == origin


def test_a_named_one_is_taken_even_where_there_are_later_ones(tmp_path):
    make(tmp_path, 5), make(tmp_path, 10)
    assert to_resume(str(tmp_path / "checkpoint-5"), None) == (tmp_path / "checkpoint-5", [])


@pytest.mark.parametrize("asked", ["auto", "checkpoint-7", "somewhere"])
def test_where_nothing_is_whole_nothing_is_resumed(tmp_path, asked):
    (make(tmp_path, 5) / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"No complete checkpoint|no such folder|holds no checkpoint"):
        to_resume(asked if asked == "auto" else str(tmp_path / asked), tmp_path)


def test_auto_without_a_folder_asks_for_it():
    with pytest.raises(CheckpointError, match="--output_dir"):
        to_resume("auto", None)


@pytest.mark.parametrize(
    ("limit", "best", "left"), [(None, None, 4), (2, None, 2), (2, 5, 3), (2, 20, 2), (9, None, 4)]
)
def test_the_newest_and_the_best_are_kept(tmp_path, limit, best, left):
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    files.rotate(tmp_path, limit, newest=20, best=best)
    kept = [files.step_of(path) for path in files.found_in(tmp_path)]
    assert len(kept) == left and kept[0] == 20 and (best is None or best in kept)


def test_what_was_just_written_is_not_deleted_for_later_ones(tmp_path):
    for step in (80, 85, 90, 100):
        make(tmp_path, step)
    files.rotate(tmp_path, 1, newest=85, best=None)
    assert [files.step_of(path) for path in files.found_in(tmp_path)] == [100, 90, 85]


def test_what_died_half_way_is_finished_or_undone(tmp_path):
    make(tmp_path, 5).rename(tmp_path / "checkpoint-5.replaced")  # killed before the new one was renamed
    for name in ("checkpoint-5.partial", "checkpoint-4.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.pt").write_text("x")
    mine = tmp_path / "checkpoint-notes.deleted"
    mine.mkdir()
    files.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", mine.name}
    assert files.damage(tmp_path / "checkpoint-5") is None


def test_links_in_a_runs_folder_are_replaced_and_their_targets_stay(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir(), elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    for name in ("checkpoint-5.partial", "checkpoint-5", "checkpoint-4.deleted", "model.partial", "merged"):
        (run / name).symlink_to(elsewhere)
    (run / "checkpoint-6").symlink_to(elsewhere / "nowhere")
    make(run, 5), make(run, 6)
    with files.renamed_into(run) as folder:
        (folder / "merged").mkdir()
    files.rotate(run, 1, newest=6, best=None)
    assert sorted(os.listdir(run)) == ["checkpoint-6", "merged"] and not (run / "merged").is_symlink()
    assert os.listdir(elsewhere) == ["precious"]


def test_a_failed_save_of_the_model_leaves_nothing_and_changes_nothing(tmp_path):
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(OSError), files.renamed_into(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        raise OSError("No space left on device")
    assert os.listdir(tmp_path) == ["config.json"] and (tmp_path / "config.json").read_text() == "old"


def test_a_save_that_failed_while_it_replaced_another_is_undone(tmp_path, monkeypatch):
    make(tmp_path, 5, "before")
    monkeypatch.setattr(files, "_flush", lambda _: None)
    rename = Path.rename

    def refuse_the_second(path, target):
        if path.suffix == files.PARTIAL:
            raise OSError("No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_second)
    with pytest.raises(OSError):
        make(tmp_path, 5, "after")
    files.undo(files.partial_of(tmp_path, 5))
    assert os.listdir(tmp_path) == ["checkpoint-5"] and files.damage(tmp_path / "checkpoint-5") is None
