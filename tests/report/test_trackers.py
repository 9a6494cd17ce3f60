"""Trackers: what each receives, that a resumed run continues in the same place, and what no tracker may do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from grpo_ds.errors import UsageError
from grpo_ds.report import trackers
from grpo_ds.report.trackers import Watched, check_trackers
from grpo_ds.run_folder.files import SUMMARY_FILE
from grpo_ds.settings.config import TrainConfig
from tests.report.finished import finished
from tests.report.tracked import track

ROOT = Path(__file__).resolve().parents[2]
with_trackio = pytest.mark.peer("trackio")


@pytest.fixture
def folder(tmp_path):
    return finished(tmp_path / "run")


TRACK = "from pathlib import Path; from tests.report.tracked import track"


def apart(code, tmp_path, **env):
    """Return the output of a process of its own: wandb and trackio read their variables once per process."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), **env}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


# TensorBoard.


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def scalars(found, name):
    return [(event.step, event.value) for event in found.Scalars(name)]


def texts(found, name):
    return [event.tensor_proto.string_val[0].decode() for event in found.Tensors(f"{name}/text_summary")]


def test_tensorboard_gets_scalars_settings_completions_and_the_end(folder):
    _, said = track(folder, "tensorboard", steps=[1, 2])
    found = events(folder / "runs")
    assert scalars(found, "reward") == [(1, 1.0), (2, 2.0)]
    assert "model: qwen2.5-0.5b" in texts(found, "config")[0] and "torch:" in texts(found, "config")[0]
    assert "Is it? \\| so" in texts(found, "completions")[1] and "\\# no idea" in texts(found, "completions")[1]
    assert scalars(found, "summary/after/accuracy") == [(7, 0.5)]
    assert scalars(found, "memory_gib/update/ram") == [(7, 5.0)]
    assert texts(found, "held_out")[0].count("Is 3 \\| even?") == 1
    assert said == f"tensorboard --logdir {folder / 'runs'}"


def test_tensorboard_shows_each_step_of_a_resumed_run_once(folder):
    progress, _ = track(folder, "tensorboard", steps=[1, 2, 3], finish=False)
    progress.global_step = 1  # the checkpoint that it resumes from
    track(folder, "tensorboard", steps=[2, 3, 4], progress=progress, offset=0.5)
    assert scalars(events(folder / "runs"), "reward") == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]


def test_tensorboards_folder_is_where_its_variable_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "else where"))
    _, said = track(folder, "tensorboard", steps=[1])
    assert scalars(events(tmp_path / "else where"), "reward") == [(1, 1.0)] and not (folder / "runs").exists()
    assert said == f"tensorboard --logdir '{tmp_path / 'else where'}'"


# Weights & Biases.


@pytest.fixture
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def payload(log):
    """Content of a wandb log without the headers of its records, which may stand within a word (LevelDB's format)."""
    content, at = b"", 7  # behind the file's own header
    while at + 7 < len(log):
        if 2**15 - at % 2**15 < 7:  # the end of a block is filled up
            at += 2**15 - at % 2**15
            continue
        size = int.from_bytes(log[at + 4 : at + 6], "little")
        content += log[at + 7 : at + 7 + size]
        at += 7 + size
    return content


def test_wandb_offline_keeps_metrics_settings_and_tables_in_the_folder(folder, offline):
    progress, said = track(folder, "wandb", steps=[1, 2])
    wandb.teardown()  # run.finish() does not wait until wandb's own process has closed the log
    (kept,) = folder.glob("wandb/offline-run-*")
    (log,) = kept.glob("run-*.wandb")
    content = payload(log.read_bytes())
    assert all(word in content for word in (b"reward", b"qwen2.5-0.5b", b"memory_gib", b"mcnemar", b"bitsandbytes"))
    tables = sorted(path.name.partition("_")[0] for path in kept.glob("files/media/table/*.json"))
    assert tables == ["completions", "completions", "held"]
    (answers,) = kept.glob("files/media/table/held_out*.json")
    assert json.loads(answers.read_text())["data"][0][:5] == ["0", "Is 0 | even?", "yes", "yes", "yes"]
    assert said == f"wandb sync {kept}" and progress.trackers["wandb"] == log.stem.removeprefix("run-")


def test_wandb_goes_on_in_the_run_that_was_interrupted(folder, offline):
    progress, _ = track(folder, "wandb", steps=[1, 2])
    again, _ = track(folder, "wandb", steps=[3], progress=progress)
    ids = {log.stem.removeprefix("run-") for log in folder.glob("wandb/offline-run-*/run-*.wandb")}
    assert ids == {again.trackers["wandb"]}


def test_wandbs_own_variables_win(folder, offline, tmp_path):
    own = {"NAME": "mine", "PROJECT": "theirs", "DIR": str(tmp_path), "RUN_ID": "abc123"}
    environment = {f"WANDB_{name}": value for name, value in own.items()}
    apart(f"{TRACK}; track(Path({str(folder)!r}), 'wandb', steps=[1])", tmp_path, **environment)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    assert b"mine" in log.read_bytes() and b"theirs" in log.read_bytes() and not (folder / "wandb").exists()


# Trackio.

LOOK = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
runs = {run: SQLiteStorage.get_logs("grpo_ds", run) for run in SQLiteStorage.get_runs("grpo_ds")}
print(json.dumps([runs, SQLiteStorage.get_run_config("grpo_ds", next(iter(runs)))], default=str))
"""


@with_trackio
def test_trackio_keeps_a_run_here_and_a_resumed_one_goes_on_in_it(folder, tmp_path):
    code = f"""
{TRACK}
folder = Path({str(folder)!r})
progress, _ = track(folder, "trackio", steps=[1, 2], finish=False)
_, said = track(folder, "trackio", steps=[3], progress=progress)
print(said)
track(folder, "trackio", steps=[1], finish=False)  # another run into a folder of that name, ended before its time
"""
    assert apart(code, tmp_path) == "trackio show --project grpo_ds\n"
    runs, config = json.loads(apart(LOOK, tmp_path))
    longer, shorter = sorted(runs.values(), key=len, reverse=True)
    assert [line["reward"] for line in longer if "reward" in line] == [1.0, 2.0, 3.0]
    assert [line["reward"] for line in shorter if "reward" in line] == [1.0]
    (end,) = [line for line in longer if "held_out" in line]
    assert end["summary/after/accuracy"] == 0.5 and end["memory_gib/update/ram"] == 5.0
    assert end["held_out"]["_value"][3]["question"] == "Is 3 | even?"
    assert [line["completions"]["_value"][0]["label"] for line in longer if "completions" in line] == ["yes"] * 3
    assert config["model"] == "qwen2.5-0.5b" and config["environment"]["versions"]["torch"]


# What no tracker may do.

LOCAL = ["wandb", "tensorboard", pytest.param("trackio", marks=with_trackio)]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    source = ROOT / "tests" / "faults" / "no_network.cpp"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.mark.parametrize("name", LOCAL)
def test_a_tracker_that_stays_here_asks_for_no_address_and_keeps_no_secret(folder, tmp_path, offline, guard, name):
    """Watched from below Python, with the hub not switched off and a token that would open it."""
    code = f"{TRACK}; track(Path({str(folder)!r}), {name!r}, steps=[1, 2])"
    secrets = {"HF_TOKEN": "hf_5ec2e75ec2e7", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd", "MY_PASSWORD": "5ec2e7-mine"}
    watched = {"LD_PRELOAD": str(guard), "NETWORK_ATTEMPTS": str(tmp_path / "attempts"), "HF_HUB_OFFLINE": "0"}
    said = apart(code, tmp_path, **watched, **secrets, HOME=str(tmp_path))
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(name in str(file.relative_to(tmp_path)) or "runs" in file.parts for file in files)
    assert not [file for file in files if b"5ec2e7" in file.read_bytes()] and "5ec2e7" not in said


class Fails:
    """A service that is down."""

    name = "fails"

    def log(self, metrics, *, step):
        raise ConnectionError("the server\nhas gone")

    completions = finish = log


def test_a_tracker_that_fails_is_warned_of_once_and_ends_nothing(capsys):
    tracker = Watched("wandb", Fails)
    for step in (1, 2):
        tracker.log({}, step=step)
        tracker.completions([], step=step)
    assert tracker.finish({}) == ""
    warning = "Warning: wandb failed (the server). Training continues; metrics.jsonl has every step.\n"
    assert capsys.readouterr().err == warning


def test_a_tracker_that_cannot_begin_is_warned_of_once_and_ends_nothing(folder, capsys, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / SUMMARY_FILE / "below a file"))
    _, said = track(folder, "tensorboard", steps=[1, 2])
    assert said == "" and capsys.readouterr().err.count("Warning: tensorboard failed (") == 1


# Checks before a model is loaded.


def test_a_tracker_that_is_not_installed_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: SimpleNamespace() if name == "wandb" else None)
    with pytest.raises(UsageError) as caught:
        check_trackers(("wandb", "tensorboard", "trackio"))
    for words in ("tensorboard is not installed: pip install tensorboard", "pip install trackio"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("env", "netrc", "works"),
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "k"}, "", True),
        ({"WANDB_MODE": "offline"}, "", True),
        ({"WANDB_MODE": "disabled"}, "", True),
        ({}, "machine api.wandb.ai login user password k", True),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password k", False),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine wandb.example.org login user password k", True),
    ],
)
def test_wandb_needs_a_key_or_to_be_told_to_stay_here(tmp_path, monkeypatch, env, netrc, works):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**env, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".netrc").write_text(netrc)
    if works:
        assert check_trackers(("wandb",)) is None
    else:
        with pytest.raises(UsageError, match="WANDB_API_KEY"):
            check_trackers(("wandb",))


@pytest.mark.parametrize(
    ("report_to", "problem"),
    [
        ("none", None),
        ("wandb, tensorboard,wandb", None),
        ("none,wandb", "none cannot be combined"),
        ("all", "report_to names all; available: none, wandb, tensorboard, trackio"),
        ("", "report_to names"),
    ],
)
def test_trackers_are_named_in_a_list(report_to, problem):
    found = TrainConfig(report_to=report_to).problems()
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


def completions_of(folder):
    return [json.loads(line)["step"] for line in (folder / "completions.jsonl").open()]


def test_a_line_cut_by_a_crash_costs_that_line_alone(tmp_path):
    lines, row = trackers.JsonLines(tmp_path), {"completion": "a"}
    lines.completions([row, row], step=1)
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"step": 2, "compl')
    trackers.JsonLines(tmp_path, history=[{"step": step} for step in (1, 2)])  # resumed from step 2
    assert completions_of(tmp_path) == [1, 1]


def test_a_wandb_run_that_never_ended_does_not_get_the_next_runs_metrics(offline, tmp_path):
    """In one process: a run that failed, or one of the user's own notebook."""
    code = f"""
import wandb
from pathlib import Path
from grpo_ds.report.trackers import make_trackers
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig
from tests.report.finished import finished
ids = {{wandb.init(dir={str(tmp_path)!r}).id}}
for name in ("failed", "next"):
    progress = Progress(1, {{}})
    make_trackers(TrainConfig(report_to="wandb"), finished(Path({str(tmp_path)!r}) / name), progress)
    ids.add(progress.trackers["wandb"])
print(len(ids), "runs")
"""
    assert "3 runs" in apart(code, tmp_path)
