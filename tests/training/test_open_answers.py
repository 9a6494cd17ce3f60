"""Complete runs on numbers, on texts, and on prompts that no answer is right for: trained, reported, graded, asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from grpo_ds.commands import ask, evaluate
from grpo_ds.report.seeds import spread, spread_lines

ROOT = Path(__file__).resolve().parents[2]
REWARDS = """
def brief(completions, **kwargs):
    return [-float(len(text)) for text in completions]

def at_times(completions, word, **kwargs):
    return [1.0 if name in text else None for text, name in zip(completions, word)]
"""
CAPITALS = ["Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Quito", "Riga"]
RECORDS = {
    "number": [{"question": f"What is {n} + {n}?", "ground_truth": 2 * n} for n in range(8)],
    "text": [{"question": f"Which city is number {n}?", "ground_truth": city} for n, city in enumerate(CAPITALS)],
    "none": [{"question": f"Write about {city}.", "word": city} for city in CAPITALS],
}
OF_LABELS = {"macro_f1", "recall", "majority_baseline", "predicted", "collapsed", "mean_p_right", "lean"}
SMALL = {"num_steps": 3, "num_generations": 2, "max_prompt_length": 500, "max_completion_length": 6, "beta": 0}


def words(**flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module", params=["number", "text", "none"])
def run(request, tiny_folder, tmp_path_factory):
    """(kind, folder of a run of three steps, its flags for other commands)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "data.json").write_text(json.dumps(RECORDS[kind]))
    (folder / "mine.py").write_text(REWARDS)
    own = {"reward_funcs": f"{folder}/mine.py:brief,{folder}/mine.py:at_times"} if kind == "none" else {}
    data = {"data": folder / "data.json", "context_field": "none"}
    flags = {**SMALL, **data, **own, "answers": kind, "eval_fraction": 0.5, "eval_steps": 1}
    once = words(model=tiny_folder, output_dir=folder / "run", save_steps=0, report_to="none", **flags)
    # In a process of its own: DeepSpeed takes no second process group.
    done = subprocess.run(
        [sys.executable, "launch/train.py", *once], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return kind, folder / "run", {"data": data["data"], **own}


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_its_figures_are_those_that_fit_the_kind(run):
    kind, folder, _ = run
    summary, held_out = read(folder, "summary.json"), read(folder, "held_out.json")
    for figures in (summary["before"], summary["after"], held_out["after"]):
        assert figures["count"] == 4 and not OF_LABELS & figures.keys()
        assert ("accuracy" in figures) == ("well_formed" in figures) == (kind != "none")
        assert ("mean_reward" in figures) == (kind == "none")
    assert ("mcnemar" in summary) == (kind != "none") and ("reward_p_value" in summary) == (kind == "none")
    assert all(("right" in row["after"]) == (kind != "none") for row in held_out["questions"])
    assert all(row["after"]["rewards"] for row in held_out["questions"])


def test_its_steps_and_evaluations_are_logged_by_the_kind(run):
    kind, folder, _ = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([line for line in lines if ("reward" in line) == is_step] for is_step in (True, False))
    assert len(steps) == 3 and len(evaluations) == 2  # before the last step; the last evaluation is in summary.json
    assert all(("accuracy" in line) == (kind != "none") for line in steps)
    assert all(("eval/reward" in line) == (kind == "none") for line in evaluations)
    assert all(("eval/accuracy" in line) == (kind != "none") for line in evaluations)
    if kind == "none":
        assert all(line["rewards/brief/mean"] <= 0 for line in steps)
        assert all("eval/rewards/brief/mean" in line for line in evaluations)


def test_page_and_card_say_what_fits_and_nothing_of_labels_or_medicine(run):
    kind, folder, _ = run
    page, card = (folder / "report.html").read_text(), ModelCard.load(folder / "README.md")
    for text in (page, card.text):
        lower = text.lower()
        assert "macro-f1" not in lower and "majority" not in lower and "lean" not in lower.replace("clean", "")
        assert "medical" not in lower and "diagnosis" not in lower
        assert ("mean reward" in lower) == (kind == "none")
    said = {"number": "to answer with a number", "text": "to answer with a text", "none": "to earn the rewards below"}
    assert said[kind] in " ".join(card.text.split())
    metrics = {result.metric_type for result in card.data.eval_results}
    assert metrics == ({"reward"} if kind == "none" else {"accuracy"})
    assert ("You answer" in card.text) == (kind != "none")


def test_eval_grades_it_by_the_kind_in_its_own_prompt(run, capsys):
    kind, folder, flags = run
    evaluate.main([*words(model=folder, eval_fraction=1, max_completion_length=6, **flags), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["count"] == 8 and figures["trained_on"] == 4 and not OF_LABELS & figures.keys()
    if kind == "none":
        assert figures["mean_rewards"].keys() == {"brief", "at_times"}
    else:
        assert figures["accuracy"] == 0.0
        evaluate.main(words(model=folder, eval_limit=2, max_completion_length=6, grading="lax", **flags))
        assert {"number": "last_number", "text": "accepted_anywhere"}[kind] in capsys.readouterr().out


def test_ask_answers_in_the_form_of_the_kind(run, capsys):
    kind, folder, flags = run
    ask.main(["--model", str(folder), "--file", str(flags["data"]), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8 and all("text" in line and "trained_on" in line for line in lines)
    assert all(("answer" in line) == ("right" in line) == (kind != "none") for line in lines)
    ask.main(["--model", str(folder), "--question", "What is 1 + 1?"])
    said = capsys.readouterr().out
    assert said.startswith("Answer:" if kind == "none" else "Reasoning:")


def test_seeds_are_summed_up_by_the_kind(run):
    kind, folder, _ = run
    lines = "\n".join(spread_lines(spread({0: read(folder, "summary.json"), 1: read(folder, "summary.json")})))
    assert ("mean reward" in lines) == (kind == "none") and ("accuracy" in lines) == (kind != "none")
    assert "macro" not in lines


def test_the_saved_config_repeats_the_prompt(run):
    kind, folder, _ = run
    config = (Path(folder) / "grpo_config.yaml").read_text()
    assert f"answers: {kind}\n" in config and "subject: ''\n" in config
