"""Checkpoints that are damaged or of another run: detected, named in the message, and never resumed."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from grpo_ds.errors import CheckpointError, UsageError
from grpo_ds.run_folder.checkpoints import damage, found_in
from grpo_ds.run_folder.resume import to_resume
from grpo_ds.task import sources
from tests.faults.forks import fork
from tests.faults.launched import Ended, flags, result, same, train, train_to_the_end

MUTATIONS = 500


@pytest.fixture(scope="module")
def saved(warm, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    warm(train_to_the_end, flags(tiny_folder, folder, num_steps=2, save_steps=1), folder.with_name("log"))
    assert [path.name for path in found_in(folder)] == ["checkpoint-2", "checkpoint-1"]
    return folder


# --- damaged files -----------------------------------------------------------------------------------------


def flip_a_bit(file: Path, other: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut_short(file: Path, other: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


def add_a_byte(file: Path, other: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + bytes([chance.randrange(256)]))


def zero_a_stretch(file: Path, other: Path, chance: random.Random) -> None:
    """Overwrite a block with zeros, as a failing disk does, starting at a byte that is not 0."""
    data = bytearray(file.read_bytes())
    first = chance.choice([place for place, byte in enumerate(data[:4096]) if byte])
    length = min(512, len(data) - first)
    data[first : first + length] = bytes(length)
    file.write_bytes(data)


def delete(file: Path, other: Path, chance: random.Random) -> None:
    file.unlink()


def swap(file: Path, other: Path, chance: random.Random) -> None:
    """Swap the contents with another file of the same checkpoint."""
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def take_from_the_step_before(file: Path, other: Path, chance: random.Random) -> None:
    """Replace the file by the one of the step before; flip a bit if they are equal."""
    older = Path(str(file).replace("checkpoint-2", "checkpoint-1").replace("global_step2", "global_step1"))
    if older.read_bytes() == file.read_bytes():
        return flip_a_bit(file, other, chance)
    shutil.copyfile(older, file)


def a_folder_instead(file: Path, other: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


KINDS = (flip_a_bit, cut_short, add_a_byte, zero_a_stretch, delete, swap, take_from_the_step_before, a_folder_instead)


def test_every_one_of_500_mutations_is_detected_and_the_checkpoint_before_is_resumed(saved, tmp_path, tried):
    run = shutil.copytree(saved, tmp_path / "run")
    newest, older = found_in(run)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"MANIFEST.json", "rank0.pt", "reference.pt", "model.safetensors"} <= {file.name for file in files}
    missed = []
    for number in range(MUTATIONS):
        chance = random.Random(number)
        mutate, file = KINDS[number % len(KINDS)], files[number // len(KINDS) % len(files)]
        other = chance.choice([path for path in files if path.read_bytes() != file.read_bytes()])
        before = {path: path.read_bytes() for path in (file, other)}
        mutate(file, other, chance)
        found, (taken, warnings) = damage(newest), to_resume("auto", run)
        named = len(warnings) == 1 and str(newest) in warnings[0] and str(found) in warnings[0]
        if not found or taken != older or not named:
            missed.append(f"{mutate.__name__} of {file.name}, number {number}: {found}")
        if file.is_dir():
            file.rmdir()
        for path, data in before.items():
            path.write_bytes(data)
        tried("mutations of a checkpoint", "detected")
    assert not missed
    assert to_resume("auto", run) == (newest, [])


def test_without_a_complete_checkpoint_nothing_is_resumed(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    for checkpoint in found_in(run):
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)No complete checkpoint is left.*model.safetensors is missing"):
        to_resume("auto", run)


# --- of another run ----------------------------------------------------------------------------------------


def resealed(checkpoint: Path) -> None:
    """Write a manifest for the files that are there now: complete, but not what was saved."""
    from grpo_ds.run_folder.checkpoints import MANIFEST, _described, _files, _manifest

    (checkpoint / MANIFEST).unlink()
    files = {str(file.relative_to(checkpoint)): _described(file) for file in _files(checkpoint)}
    (checkpoint / MANIFEST).write_text(_manifest(files))


def without(name: str, run: Path) -> None:
    """Delete files, and write a new manifest without them."""
    for checkpoint in found_in(run):
        found = list(checkpoint.rglob(name))
        assert found, name
        for file in found:
            file.unlink()
        resealed(checkpoint)


def other_json(run: Path) -> None:
    source = json.loads((Path(__file__).parents[2] / "ds_configs/zero2.json").read_text())
    source["optimizer"]["params"]["betas"] = [0.8, 0.9]
    (run.parent / "ds.json").write_text(json.dumps(source))


def elastic_json(run: Path) -> None:
    source = json.loads((Path(__file__).parents[2] / "ds_configs/zero2.json").read_text())
    source["zero_optimization"]["elastic_checkpoint"] = True
    (run.parent / "ds.json").write_text(json.dumps(source))


def other_data(run: Path) -> None:
    record = {"question": "Does it work?", "context": "It worked.", "ground_truth": "yes"}
    records = [{**record, "question": f"Does it work {i} times?"} for i in range(20)]
    (run.parent / "data.json").write_text(json.dumps(records))


def nothing(run: Path) -> None:
    pass


def all_gone(run: Path) -> None:
    for checkpoint in found_in(run):
        shutil.rmtree(checkpoint)


# name -> (what is done to the run, flags, exit code, words of the message)
OTHERS = {
    "other flags": (nothing, ["--learning_rate", "1e-4", "--seed", "3"], 4, ["--learning_rate is 0.0001", "--seed"]),
    "other data": (other_data, ["--data", "DATA"], 4, ["the training questions"]),
    "other DeepSpeed JSON": (other_json, ["--ds", "JSON"], 4, ["the DeepSpeed JSON"]),
    "elastic_checkpoint": (elastic_json, ["--ds", "JSON"], 2, ["elastic_checkpoint", "8-bit"]),
    "no checkpoints": (all_gone, [], 4, ["holds no checkpoint", "nothing can be resumed"]),
    "no optimizer shard": (partial(without, "*optim_states.pt"), [], 4, ["optim_states.pt"]),
    "no model shard": (partial(without, "*model_states.pt"), [], 4, ["model_states.pt"]),
    "no state of the rank": (partial(without, "rank0.pt"), [], 4, ["rank*.pt"]),
    "no trainer_state.json": (partial(without, "trainer_state.json"), [], 4, ["trainer_state.json"]),
    "no grpo_config.yaml": (partial(without, "grpo_config.yaml"), [], 4, ["grpo_config.yaml"]),
    "no weights": (partial(without, "model.safetensors"), [], 4, ["*.safetensors"]),
    "no reference": (partial(without, "reference.pt"), [], 4, ["reference.pt"]),
}


def refused(saved: Path, folder: Path, name: str) -> None:
    spoil, words, code, expected = OTHERS[name]
    run = shutil.copytree(saved, folder / "run")
    spoil(run)
    files = {"DATA": str(folder / "data.json"), "JSON": str(folder / "ds.json")}
    words = ["--resume_from_checkpoint", "auto", "--output_dir", str(run), *(files.get(word, word) for word in words)]
    ended = train(words, folder / "log", no_model)
    assert ended.code == code, ended.err
    assert all(word in ended.err for word in expected), ended.err
    assert "Traceback" not in ended.err and len(ended.err.strip().splitlines()) <= 6


def no_model() -> None:
    """Fail if a model is loaded: a refusal must come before."""
    from grpo_ds.training import trainer

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    trainer.trainable_policy = loaded


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run_or_incomplete_is_refused_before_a_model_is_loaded(
    name, saved, warm, tmp_path, tried
):
    warm(refused, saved, tmp_path, name)
    tried("resume of something else", "refused by name")


def without_latest(saved: Path, folder: Path) -> None:
    """Resume without DeepSpeed's `latest` file. By itself DeepSpeed would load nothing, with only a warning."""
    run = shutil.copytree(saved, folder / "run")
    shutil.rmtree(run / "checkpoint-2")
    without("latest", run)
    words = ["--resume_from_checkpoint", "auto", "--output_dir", str(run)]
    ended = train(words, folder / "log")
    assert ended.code == 0, ended.err
    assert same(result(run), result(saved))


def test_without_deepspeeds_latest_file_the_run_resumes_from_its_step(saved, warm, tmp_path, tried):
    warm(without_latest, saved, tmp_path)
    tried("missing `latest`", "resumed bit by bit")


# --- folders -----------------------------------------------------------------------------------------------


def refused_folder(model: Path, folder: Path, where: str, expected: str) -> None:
    ended = train(flags(model, Path(where)), folder / "log", no_model)
    assert ended.code == 2, ended.err
    assert expected in ended.err and "Traceback" not in ended.err


def test_a_folder_that_cannot_be_written_is_named_before_a_model_is_loaded(warm, tiny_folder, tmp_path, tried):
    (tmp_path / "file").write_text("no folder")
    for where, expected in [(f"{tmp_path}/file/run", "Not a directory"), ("/proc/run", "cannot be written to")]:
        warm(refused_folder, tiny_folder, tmp_path, where, expected)
        tried("disk full or read-only", "refused before a model is loaded")


def second_run(saved: Path, folder: Path) -> None:
    """Start a second run while the first one is alive: it would delete what the first one is writing."""
    from grpo_ds.run_folder.lock import lock, release

    run = shutil.copytree(saved, folder / "run")
    lock(run)
    here = (run / "checkpoint-3.partial").mkdir() or "checkpoint-3.partial"

    ended = train(["--resume_from_checkpoint", "auto", "--output_dir", str(run)], folder / "log", no_model)
    assert ended.code == 4 and "in use by a running process" in ended.err, ended.err
    assert (run / here).is_dir()
    release()
    assert fork(lambda: lock(run))[0] == 0


def test_a_second_run_on_the_same_folder_is_refused_while_the_first_lives(saved, warm, tmp_path, tried):
    warm(second_run, saved, tmp_path)
    tried("resume of something else", "refused by name")


def ends_while_loading(model: Path, folder: Path, end: Callable[[], None]) -> Ended:
    """A run that ends while its model is loaded: the folder is its own by then, and nobody's afterwards."""
    from grpo_ds.run_folder.lock import lock_new
    from grpo_ds.training import trainer

    run = folder / "outputs" / "run"

    def load(*_: object, **__: object) -> None:
        code, failure = fork(lambda: lock_new(run))
        assert code and "in use by a running process" in failure
        end()

    def before() -> None:
        trainer.trainable_policy = load

    ended = train(flags(model, run), folder / "log", before)
    assert not run.parent.exists()
    return ended


def refuse() -> None:
    raise UsageError("The model cannot be loaded.")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("end", "code"), [(refuse, 2), (stop, 75)])
def test_a_folder_is_locked_before_the_model_is_loaded_and_gone_if_nothing_comes_of_it(
    end, code, warm, tiny_folder, tmp_path, tried
):
    ended = warm(ends_while_loading, tiny_folder, tmp_path, end)
    assert ended.code == code, ended.err
    tried("a folder for two runs", "one gets it")


WANDERS = """
import os

def wanders(completions, **_):
    os.chdir(os.path.join(os.path.dirname(__file__), "elsewhere"))
    return [len(completion) % 7 / 7 for completion in completions]
"""


def wandering(model: Path, folder: Path) -> None:
    """Train with relative paths and a reward function that changes the working folder; resume from another one."""
    work, elsewhere = folder / "work", folder / "work" / "elsewhere"
    elsewhere.mkdir(parents=True)
    (work / "wanders.py").write_text(WANDERS)
    (work / "prompt.txt").write_text("Answer in the two tags.")
    shutil.copytree(model, work / "model")
    shutil.copyfile(Path(sources.__file__).with_name("sample.json"), work / "data.json")
    changes = {
        "data": "data.json", "system_prompt": "prompt.txt", "reward_funcs": "wanders.py:wanders",
        "log_completions": True, "num_steps": 2, "save_steps": 1, "report_to": "tensorboard",
    }  # fmt: skip
    words = [*flags(Path("model"), Path("run"), **changes)]

    def before() -> None:
        os.chdir(work)
        os.umask(0o027)

    ended = train(words, folder / "log", before)
    run = work / "run"
    assert ended.code == 0, ended.err
    assert list(elsewhere.iterdir()) == [] and f"Model, its card, metrics and memory: {run}\n" in ended.out
    # DeepSpeed's two scripts in a checkpoint may be executed.
    modes = {path: (path.is_dir(), path.stat().st_mode & 0o777) for path in run.rglob("*") if path.suffix != ".py"}
    assert {path: mode for path, mode in modes.items() if mode not in ((False, 0o640), (True, 0o750))} == {}
    straight, moved = result(run), run.rename(work / "moved")
    for gone in (moved / "checkpoint-2", work / "prompt.txt"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    again = train(["--resume_from_checkpoint", str(moved)], folder / "log", lambda: os.chdir("/"))
    assert again.code == 0, again.err
    assert same(result(moved), straight) and list(elsewhere.iterdir()) == []


def test_a_reward_that_changes_the_working_folder_moves_no_file_of_the_run(warm, tiny_folder, tmp_path, tried):
    warm(wandering, tiny_folder, tmp_path)
    tried("another working folder", "one run, resumed bit by bit")
