"""`train --num_seeds`: one recipe, several seeds, and what they have in common."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import yaml

from grpo_ds.commands import seeds, train
from grpo_ds.errors import CheckpointError, UsageError
from grpo_ds.report.seeds import FIGURES, spread, spread_lines
from grpo_ds.run_folder.lock import release
from grpo_ds.system import signals
from grpo_ds.system.invocation import again

ROOT = Path(__file__).resolve().parents[2]
SUMMARIES = {
    seed: {
        "before": {"accuracy": 0.5, "mean_p_right": 0.5, "macro_f1": 0.4, "reasoning_gain": gain, "lean": {"yes": 1}},
        "after": {"accuracy": accuracy, "mean_p_right": accuracy - 0.1, "macro_f1": 0.5, "reasoning_gain": 0.1},
        "p_right_change": accuracy - 0.6,
    }
    for seed, accuracy, gain in ((4, 0.7, 0.0), (3, 0.4, None), (5, 0.6, 0.1))
}


def test_median_and_range_of_every_figure_that_all_runs_have():
    found = spread(SUMMARIES)
    accuracies = [0.4, 0.7, 0.6]  # in the order of the seeds
    assert found["seeds"] == [3, 4, 5]
    assert found["after"]["accuracy"] == {
        "median": median(accuracies), "lowest": 0.4, "highest": 0.7, "values": accuracies
    }  # fmt: skip
    assert "reasoning_gain" not in found["before"] and found["after"]["reasoning_gain"]["median"] == 0.1
    assert found["p_right_change"]["lowest"] == pytest.approx(-0.2)
    assert {*found["before"], *found["after"]} <= FIGURES.keys()
    text = "\n".join(spread_lines(found))
    assert (
        "3 seeds (3, 4, 5)" in text and "accuracy: before 0.500 (0.500 to 0.500), after 0.600 (0.400 to 0.700)" in text
    )
    assert "change of mean p(right): +0.000 (-0.200 to +0.100)" in text


@pytest.fixture
def runs(monkeypatch):
    """Run no run: note its flags, write what it leaves, and end with the code that is next in `codes`."""
    started, codes = [], []

    def run(words):
        flags = dict(zip(words[-10::2], words[-9::2], strict=True))
        started.append(flags | {"recipe": yaml.safe_load(Path(flags["--config"]).read_text())})
        folder, code = Path(flags["--output_dir"]), codes.pop(0) if codes else 0
        (folder / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        (folder / "run_status.json").write_text(json.dumps({"state": "stopped" if code else "done"}))
        if not code:
            (folder / "summary.json").write_text(json.dumps(SUMMARIES[int(flags["--seed"])]))
        return code

    monkeypatch.setattr(seeds, "pass_signals_on", run)
    run.started, run.codes = started, codes
    yield run
    release()


def test_each_seed_is_an_ordinary_run_with_the_flags_of_all(runs, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(["--num_seeds", "3", "--seed", "3", "--beta", "0", "--labels", "yes,no", "--output_dir", str(out)])
    assert [(flags["--seed"], Path(flags["--output_dir"]).name) for flags in runs.started] == [
        ("3", "seed-3"), ("4", "seed-4"), ("5", "seed-5")
    ]  # fmt: skip
    for flags in runs.started:
        assert flags["recipe"] == {"seed": 3, "beta": 0.0, "labels": "yes,no"}
        assert (flags["--num_seeds"], flags["--resume_from_checkpoint"]) == ("1", "null")
    assert json.loads((out / "summary.json").read_text()) == spread(SUMMARIES)
    report = (out / "report.md").read_text()
    assert "| accuracy | after | 0.600 | 0.400 | 0.700 | 0.400 | 0.700 | 0.600 |" in report and "seed 4" in report
    assert "after 0.600 (0.400 to 0.700)" in capsys.readouterr().out


@pytest.mark.parametrize("code", [75, 130, 5])
def test_what_stopped_goes_on_where_it_was(runs, tmp_path, code):
    out, flags = str(tmp_path / "out"), ["--num_seeds", "3"]
    runs.codes += [0, code]
    with pytest.raises(seeds.SeedFailed, match="--resume_from_checkpoint auto") as stopped:
        train.main([*flags, "--seed", "3", "--output_dir", out])
    release()
    assert stopped.value.exit_code == code and len(runs.started) == 2 and not (tmp_path / "out/report.md").exists()
    train.main(str(stopped.value).splitlines()[1].split()[2:])  # the command that it recommends
    resumed = [(flags["--seed"], flags["--resume_from_checkpoint"]) for flags in runs.started[2:]]
    assert resumed == [("4", "auto"), ("5", "null")]
    assert json.loads((tmp_path / "out/summary.json").read_text())["seeds"] == [3, 4, 5]


def test_more_seeds_are_added_and_another_recipe_is_not(runs, tmp_path):
    out = ["--output_dir", str(tmp_path / "out")]
    train.main(["--num_seeds", "2", "--seed", "3", "--beta", "0", *out])
    release()
    again = ["--resume_from_checkpoint", "auto", *out]
    with pytest.raises(UsageError, match="--beta: these runs have the flags of"):
        train.main(["--num_seeds", "3", "--beta", "0.1", *again])
    release()
    train.main(["--num_seeds", "3", "--beta", "0", *again])
    assert [flags["--seed"] for flags in runs.started] == ["3", "4", "5"]


def test_a_folder_with_files_is_not_overwritten_and_one_without_a_recipe_not_resumed(runs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds files"):
        train.main(["--num_seeds", "2", "--output_dir", str(tmp_path)])
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml"):
        train.main(["--num_seeds", "2", "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"])
    with pytest.raises(UsageError, match="num_seeds is 0"):
        train.main(["--num_seeds", "0"])
    assert not runs.started


def test_several_ranks_are_told_to_start_each_seed_by_itself(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--seed 0, --seed 1"):
        train.main(["--num_seeds", "2", "--output_dir", str(tmp_path / "out")])
    assert not runs.started and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["/bin/grpo-ds", "train", "--beta", "0"], ["/bin/grpo-ds", "train", "--x"]),
        (["/p/grpo_ds/__main__.py", "train", "--beta", "0"], ["-m", "grpo_ds", "train", "--x"]),
        (["launch/train.py", "--beta", "0"], ["launch/train.py", "--x"]),
        (["launch/train.py", "--local_rank=0", "--beta", "0"], ["launch/train.py", "--local_rank=0", "--x"]),
    ],
)
def test_the_same_entry_point_starts_each_run(monkeypatch, typed, words):
    monkeypatch.setattr(sys, "argv", typed)
    assert again(["--x"]) == [sys.executable, *words]


WAITS = "import signal, sys; signal.signal({0}, lambda *_: sys.exit(75)); print('on', flush=True); signal.pause()"
PASSES = "import sys; from grpo_ds.system.signals import pass_signals_on; sys.exit(pass_signals_on(sys.argv[1:]))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_run_and_its_code_comes_back(number):
    words = [sys.executable, "-c", PASSES, sys.executable, "-c", WAITS.format(int(number))]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert parent.stdout.readline() == b"on\n"
    parent.send_signal(number)
    assert parent.wait(timeout=60) == 75


def test_a_run_whose_command_was_killed_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(signals, "CHECK_EVERY", 0.05)
    watched = (
        "import os, time; from grpo_ds.system import signals; signals.CHECK_EVERY = 0.05\n"
        "with signals.exit_on_signal():\n    print(os.getpid(), flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", PASSES, sys.executable, "-c", watched]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{child}/cmdline") and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_seeds_of_the_tiny_model(tiny_folder, tmp_path):
    out = tmp_path / "out"
    flags = (
        f"--model {tiny_folder} --num_steps 1 --num_generations 2 --batch_size 1 --max_prompt_length 480 "
        f"--max_completion_length 4 --eval_limit 4 --eval_samples 2 --preflight false "
        f"--num_seeds 2 --seed 1 --output_dir {out}"
    )
    words = [sys.executable, str(ROOT / "launch/train.py"), *flags.split()]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found, runs = json.loads((out / "summary.json").read_text()), [out / "seed-1", out / "seed-2"]
    own = [json.loads((run / "summary.json").read_text()) for run in runs]
    for figure in ("accuracy", "mean_p_right", "vote_accuracy"):
        assert found["after"][figure]["values"] == [summary["after"][figure] for summary in own]
    assert [yaml.safe_load((run / "grpo_config.yaml").read_text())["seed"] for run in runs] == [1, 2]
    assert "Held-out figures of 2 seeds (1, 2)" in done.stdout
    assert not (out / ".lock").exists() and all((run / "report.html").exists() for run in runs)
