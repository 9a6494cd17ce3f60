"""Between two parts of a run its inputs change, its model moves: noticed, named, or of no consequence."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grpo_ds.run_folder.checkpoints import found_in
from tests.faults.launched import flags, result, same, status, train, train_to_the_end
from tests.faults.test_damaged import no_model

REWARD = """
import helper
def judge(completions, gold, **_):
    return [helper.score(text) + g / 100 for text, g in zip(completions, gold)]
"""
HELPER = "def score(text):\n    return sum(map(ord, text)) % 7 / 7\n"


def records(**changes) -> str:
    base = [{"question": f"Is it {i}?", "context": "C.", "ground_truth": ["yes", "no"][i % 2]} for i in range(20)]
    return json.dumps([{**record, "gold": i, "note": i, **changes} for i, record in enumerate(base)])


def started(model: Path, folder: Path) -> None:
    """Train two steps with a reward of one's own; the straight run goes on to three."""
    (folder / "data.json").write_text(records())
    (folder / "mine.py").write_text(REWARD)
    (folder / "helper.py").write_text(HELPER)
    own = {"data": folder / "data.json", "reward_funcs": f"{folder}/mine.py:judge", "save_steps": 2}
    train_to_the_end(flags(model, folder / "run", **own, num_steps=2), folder / "log")
    train_to_the_end(flags(model, folder / "straight", **own, num_steps=3), folder / "log")


@pytest.fixture(scope="module")
def begun(warm, tiny_folder, tmp_path_factory):
    """A folder with a run of two steps whose model has gone, the same run of three, its data and reward files."""
    folder = tmp_path_factory.mktemp("begun")
    model = shutil.copytree(tiny_folder, folder / "model")
    warm(started, model, folder)
    shutil.rmtree(model)
    return folder


def resume(begun: Path, folder: Path, *words: str, before=lambda: None):
    """Resume a copy of the run; {} in words is the test's folder."""
    run = shutil.copytree(begun / "run", folder / "run")
    words = ("--resume_from_checkpoint", str(run / "checkpoint-2"), *words)
    return run, train([word.format(folder) for word in words], folder / "log", before)


def changed(folder: Path) -> None:
    """Write the same questions with another value in both columns, and another helper."""
    (folder / "data.json").write_text(records(gold=3, note=3))
    (folder / "mine.py").write_text(REWARD)
    (folder / "helper.py").write_text(HELPER.replace("% 7", "% 5"))


CHANGED = ("--num_steps", "3", "--data", "{}/data.json", "--reward_funcs", "{}/mine.py:judge")
# name -> (typed flags, words of the error)
REFUSED = {
    "a column and a reward file": (CHANGED, ["the column gold and the reward file helper.py changed"]),
    "fewer steps than are done": (("--num_steps", "1"), ["--num_steps 1 is less than the 2 steps"]),
}


def refused(begun: Path, folder: Path, name: str) -> None:
    changed(folder)
    words, expected = REFUSED[name]
    _, ended = resume(begun, folder, *words, before=no_model)
    assert ended.code == 4 and all(word in ended.err for word in expected), ended.err
    assert "Traceback" not in ended.err and len(ended.err.strip().splitlines()) <= 6


@pytest.mark.parametrize("name", REFUSED)
def test_changed_inputs_are_refused_before_a_model_is_loaded(name, begun, warm, tmp_path, tried):
    warm(refused, begun, tmp_path, name)
    tried("changed inputs of a run", "refused by name")


def resumed_all_the_same(begun: Path, folder: Path) -> None:
    changed(folder)
    run, ended = resume(begun, folder, *CHANGED, "--resume_changed_inputs", "true")
    assert ended.code == 0, ended.err
    assert "Warning: since the checkpoint was saved, the column gold and the reward file helper.py" in ended.out
    inputs = ["the column gold, at step 2", "the reward file helper.py, at step 2"]
    said = "; ".join(inputs)
    assert status(run)["changed_inputs"] == inputs
    assert f"its inputs had changed: {said}" in (run / "README.md").read_text()
    assert f"its inputs had changed: {said}" in (run / "report.html").read_text()
    assert "resume_changed_inputs" not in (run / "grpo_config.yaml").read_text()
    lines, _ = result(run)
    straight, _ = result(begun / "straight")
    assert lines[:2] == straight[:2] and lines[2]["reward"] != straight[2]["reward"]
    (folder / "again").mkdir()  # the inputs of now are the run's own
    shutil.rmtree(run / "checkpoint-2")
    assert train(["--resume_from_checkpoint", str(run), "--plan"], folder / "again").code == 0
    assert train(["--resume_from_checkpoint", str(run)], folder / "again").code == 0
    assert status(run)["changed_inputs"] == inputs


def test_a_run_that_is_resumed_all_the_same_says_so_in_its_log_card_and_report(begun, warm, tmp_path, tried):
    warm(resumed_all_the_same, begun, tmp_path)
    tried("changed inputs of a run", "resumed as asked, and said")


def without_its_model(begun: Path, folder: Path) -> None:
    run, ended = resume(begun, folder, "--num_steps", "3")
    assert ended.code == 0, ended.err
    assert same(result(run), result(begun / "straight"))


def test_a_full_checkpoint_is_resumed_bit_by_bit_without_the_model_it_began_with(begun, warm, tmp_path, tried):
    warm(without_its_model, begun, tmp_path)
    tried("model moved or gone", "resumed bit by bit")


def with_more_held_out(begun: Path, folder: Path) -> None:
    run, ended = resume(begun, folder, "--num_steps", "3", "--eval_limit", "4")
    assert ended.code == 0, ended.err
    assert "2 of 4 held-out questions were answered before training" in ended.out
    held_out = json.loads((run / "held_out.json").read_text())
    assert held_out["before"]["count"] == held_out["after"]["count"] == len(held_out["questions"]) == 2
    assert same(result(run), result(begun / "straight"))


def test_another_eval_limit_changes_no_step_and_compares_what_was_answered_before(begun, warm, tmp_path, tried):
    warm(with_more_held_out, begun, tmp_path)
    tried("changed inputs of a run", "of no consequence")


def adapter_moved(model: Path, folder: Path) -> None:
    base = shutil.copytree(model, folder / "base")
    adapter = {"lora_r": 4, "save_steps": 1, "merge_adapter": "true"}
    train_to_the_end(flags(base, folder / "run", **adapter, num_steps=1), folder / "log")
    train_to_the_end(flags(base, folder / "straight", **adapter, num_steps=2), folder / "log")
    there = base.rename(folder / "there")
    words = ["--resume_from_checkpoint", str(found_in(folder / "run")[0]), "--num_steps", "2"]
    alone = train(words, folder / "log", no_model)
    assert alone.code == 4 and f"adapter on {base}" in alone.err and "--model FOLDER" in alone.err, alone.err
    other = shutil.copytree(there, folder / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for accepted in ([], ["--resume_changed_inputs", "true"]):
        wrong = train([*words, "--model", str(other), *accepted], folder / "log", no_model)
        assert wrong.code == 4 and "the weights of the base model changed" in wrong.err, wrong.err
    right = train([*words, "--model", str(there)], folder / "log")
    assert right.code == 0, right.err
    assert same(result(folder / "run", "merged"), result(folder / "straight", "merged"))
    assert json.loads((folder / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(there)


def test_a_checkpoint_of_an_adapter_takes_its_base_from_elsewhere_and_no_other(warm, tiny_folder, tmp_path, tried):
    warm(adapter_moved, tiny_folder, tmp_path)
    tried("model moved or gone", "resumed bit by bit")
