"""The complete trainer on a tiny model: through the real launcher, and it really learns."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ds.commands.evaluate import prepare
from grpo_ds.memory.phases import OutOfMemory
from grpo_ds.report.console import Console
from grpo_ds.run_folder.checkpoints import found_in
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.settings.saved_config import CONFIG_FILE
from grpo_ds.system import ranks
from grpo_ds.task.questions import fingerprint, not_among, read_questions, split_questions
from grpo_ds.training.run import Run
from grpo_ds.training.trainer import Trainer
from tests.conftest import SHARED_DATA

ROOT = Path(__file__).resolve().parents[2]
REAL_DATA = SHARED_DATA / "pubmedqa_labeled_yesno.json"


def launch(*launcher: str, **flags: object) -> str:
    """Start launch/train.py as a user does; return what it printed."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if Path(launcher[0]).name == "deepspeed":  # its default port may be in use
        launcher = (*launcher, "--master_port", str(ranks._free_port()))
    result = subprocess.run(
        [*launcher, "launch/train.py", *words],
        cwd=ROOT,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def launched(tiny_folder, tmp_path_factory):
    """`deepspeed launch/train.py` with everything on: two iterations, mu 2, split batches, two trackers."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    data = str(REAL_DATA) if REAL_DATA.exists() else "sample"
    flags = {
        "ds": "ds_configs/zero2.json", "model": tiny_folder, "data": data, "output_dir": folder,
        "num_iterations": 2, "num_steps": 2, "mu": 2, "pack_tokens": 800, "num_generations": 3,
        "max_prompt_length": 700, "max_completion_length": 8, "eval_limit": 4, "learning_rate": 1e-3,
        "report_to": "wandb,tensorboard", "log_completions": True,
    }  # fmt: skip
    return folder, launch(str(Path(sys.executable).with_name("deepspeed")), **flags)


def test_bf16_masters_train_the_same_way(tiny_folder, tmp_path):
    flags = {
        "ds": "ds_configs/zero2_lowram.json", "model": tiny_folder, "data": "sample", "output_dir": tmp_path / "run",
        "num_steps": 2, "num_generations": 2, "max_prompt_length": 700, "max_completion_length": 4,
        "eval_limit": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    output = launch(sys.executable, **flags)
    assert "step 2/2" in output
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert saved.dtype == torch.bfloat16 and all(p.isfinite().all() for p in saved.parameters())


def test_two_ranks_under_the_launcher_ask_twice_the_questions_and_one_of_them_writes(tiny_folder, tmp_path):
    flags = {
        "ds": "ds_configs/zero2.json", "model": tiny_folder, "data": "sample", "output_dir": tmp_path / "run",
        "num_steps": 1, "num_generations": 2, "max_prompt_length": 700, "max_completion_length": 4, "eval_limit": 2,
    }  # fmt: skip
    output = launch(str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", **flags)
    assert output.count("step 1/1") == 1
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["grad_norm"] > 0 or line["frac_reward_zero_std"] == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_the_launcher_trains_and_says_what_it_did(launched):
    _, output = launched
    assert "untested optimizer" not in output  # DeepSpeed's warning about our optimizer
    for words in (
        "Model:",
        "Data:",
        "Before training: accuracy",
        "Reference: int8",
        "step 4/4",
        "McNemar",
        "Verdict: It ",
        "  Lean: ",
    ):
        assert words in output
    assert output.count("Reference: int8") == 2  # remade at the start of each outer iteration


def test_the_memory_of_every_phase_stands_beside_its_plan(launched):
    folder, output = launched
    report = json.loads((folder / "memory.json").read_text())
    measured = {use["phase"] for use in report["measured"]}
    assert measured == {
        "load",
        "initialise",
        "preflight",
        "evaluate",
        "reference",
        "floor",
        "sample",
        "update",
        "step",
        "save",
    }
    assert set(report["planned"]) - {"resume"} <= measured and (folder / "memory.svg").stat().st_size > 1000
    assert "Memory plan:" in output and "Memory by phase" in output and "RAM: " in output and "needs most" in output


def test_the_run_ends_with_its_report(launched):
    folder, output = launched
    assert f"Report: {folder / 'report.html'}" in output and "Warning: no report" not in output
    page = (folder / "report.html").read_text()
    assert "This run has not ended" not in page and "damaged" not in page
    assert all(part in page for part in ("Held-out questions", "Memory over time", "KL per token", "Settings"))


def test_the_first_prompt_is_shown_and_every_answer_says_what_is_wrong_with_it(launched):
    folder, output = launched
    shown = re.search(r"The first prompt, question \S+, \d+ tokens:\n(.*?)The first 4 completions", output, re.S)[1]
    assert "<reasoning>" in shown and "<|im_start|>user" in shown and "<|im_start|>assistant" in shown[-600:]
    cut = "cut at --max_completion_length"
    assert f"Ill-formed: 4 x {cut}" in output  # of 8 tokens
    held_out, rows = json.loads((folder / "held_out.json").read_text()), (folder / "completions.jsonl").read_text()
    answers = [question[when] for question in held_out["questions"] for when in ("before", "after")]
    assert {answer["broken_rule"] for answer in answers} == {cut}
    assert cut in {json.loads(line)["broken_rule"] for line in rows.splitlines()}
    assert f"✗ <bdi>{cut}</bdi>" in (folder / "report.html").read_text()


def test_p_right_stands_in_summary_answers_page_card_console_and_trackers(launched):
    folder, output = launched
    summary, held_out = (json.loads((folder / name).read_text()) for name in ("summary.json", "held_out.json"))
    for when in ("before", "after"):
        of = [question[when]["p"] for question in held_out["questions"]]
        right = [p[question["label"]] for p, question in zip(of, held_out["questions"], strict=True)]
        figures = summary[when]
        assert figures["mean_p_right"] == pytest.approx(sum(right) / len(right))
        assert figures["lean"] == pytest.approx({label: sum(p[label] for p in of) / len(of) for label in of[0]})
        assert sum(figures["class_shares"].values()) == 1 and figures["reasoning_gain"] is None  # nothing is in form
        for file in ("report.html", "README.md"):
            assert f"{figures['mean_p_right']:.3f}" in (folder / file).read_text()
        assert output.count(f"p(right) {figures['mean_p_right']:.3f}")
    low, high = summary["p_right_change_interval"]
    assert low <= summary["p_right_change"] <= high and 0 < summary["p_right_p_value"] <= 1
    assert "Change of mean p(right)" in output and "paired test" in (folder / "README.md").read_text()
    assert list(folder.glob("wandb/*/run-*.wandb")) and list(folder.glob("runs/events*"))


def test_metrics_hold_a_line_a_step(launched):
    folder, _ = launched
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {"reward", "rewards/correctness/mean", "rewards/format/std", "loss", "kl", "grad_norm", "reward_std"}
    wanted |= {"completions/mean_length", "completions/clipped_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean"}
    wanted |= {"num_tokens", "epoch", "step_time", "frac_reward_zero_std", "entropy"}
    wanted |= {
        "tokens_per_second",
        "seconds/sample",
        "seconds/reference",
        "seconds/step",
        "seconds/update",
        "memory/ram_gib",
    }
    assert all(wanted <= line.keys() for line in lines)
    assert all(line["completions/mean_length"] <= 8 for line in lines)
    tokens, epochs = ([line[name] for line in lines] for name in ("num_tokens", "epoch"))
    assert tokens == sorted(set(tokens)) and all(map(float.is_integer, map(float, tokens)))
    assert epochs == pytest.approx([epochs[0] * step for step in (1, 2, 3, 4)])


def test_the_model_loads_in_plain_transformers_and_has_changed(launched, tiny_folder):
    folder, _ = launched
    trained, before = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, tiny_folder))
    assert not torch.equal(trained.get_input_embeddings().weight, before.get_input_embeddings().weight)
    summary = json.loads((folder / "summary.json").read_text())
    pairs = [*zip(trained.bfloat16().parameters(), before.bfloat16().parameters(), strict=True)]
    changed = sum(int((now != start).sum()) for now, start in pairs) / sum(it.numel() for it, _ in pairs)
    assert 0 < changed == summary["weights_changed"]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    trained.float()
    assert trained(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_run_says_how_it_was_made(launched):
    folder, _ = launched
    saved = yaml.safe_load((folder / CONFIG_FILE).read_text())
    assert saved["num_generations"] == 3 and saved["mu"] == 2


def test_trackers_kept_the_run_here_and_how_to_look_at_it_is_said(launched):
    folder, output = launched
    (kept,) = folder.glob("wandb/offline-run-*")
    assert list(folder.glob("runs/events.out.tfevents.*")) and list(kept.glob("files/media/table/held_out*.json"))
    assert f"wandb: wandb sync {kept}\n" in output and f"tensorboard: tensorboard --logdir {folder}/runs\n" in output


def test_a_model_card_stands_in_the_runs_folder_and_in_no_checkpoint(launched):
    folder, _ = launched
    card = ModelCard.load(folder / "README.md")
    accuracy = json.loads((folder / "summary.json").read_text())["after"]["accuracy"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["accuracy"] == accuracy
    assert "4 steps of GRPO (" in card.text and not list(folder.glob("checkpoint-*/README.md"))


def test_the_code_in_the_card_asks_the_model(launched, capsys):
    folder, _ = launched
    (code,) = re.findall("```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(code.replace("THIS_FOLDER", str(folder)), found)
    assert 0 < found["output"].shape[1] - found["ids"].shape[1] <= 8 and capsys.readouterr().out


def test_the_saved_model_samples_as_it_was_trained(launched):
    settings = json.loads((launched[0] / "generation_config.json").read_text())
    assert {name.removesuffix("_token_id") for name in settings} <= {"bos", "eos", "pad", "transformers_version"}


@pytest.mark.peer("lm_eval")
def test_lm_eval_loads_the_model_and_scores_with_it(launched):
    scores_by_hand(launched[0], AutoModelForCausalLM.from_pretrained(launched[0], dtype=torch.float32))


def scores_by_hand(folder, model, **options):
    """Check that lm-eval finds the log-likelihood of a continuation that `model` gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(**{"pretrained": str(folder), **options}, device="cpu", dtype="float32", batch_size=1)
    request = Instance("loglikelihood", {}, ("Is it?", " yes"), 0)
    ((score, _),) = backend.loglikelihood([request])
    prompt, whole = (torch.tensor([backend.tok_encode(text)]) for text in ("Is it?", "Is it? yes"))
    said = whole[0, prompt.shape[1] :]
    with torch.no_grad():
        known_ids = backend.model(whole).logits.shape[-1]  # with an adapter it cuts the head to the tokenizer's ids
        logits = model(whole).logits[0, prompt.shape[1] - 1 : -1, :known_ids]
    wanted = logits.log_softmax(-1)[range(len(said)), said].sum()
    assert score == pytest.approx(float(wanted), abs=1e-4)  # lm-eval sums in another order


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("evaluate_model.py", ["--eval_limit", "4"]),
        ("ask.py", ["--question", "Does it help?", "--context", "It helped 9 of 10."]),
    ],
)
def test_the_saved_model_can_be_evaluated_and_asked(launched, script, flags):
    command = [sys.executable, f"launch/{script}", "--model", str(launched[0]), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    assert ("accuracy" if script.startswith("eval") else "Answer:") in result.stdout


def test_what_it_was_trained_on_stands_beside_the_model_and_in_its_checkpoints(launched):
    folder, _ = launched
    (data,) = {yaml.safe_load((folder / CONFIG_FILE).read_text())["data"]}
    train, held_out = split_questions(read_questions(data).questions, eval_fraction=0.2, seed=0)
    for model in (folder, *found_in(folder)):
        assert read_trained_on(model) == {fingerprint(question) for question in train}
        asked = prepare(["--model", str(model), "--data", data])[2]
        assert (asked.questions, asked.left_out) == (held_out, len(train))


@pytest.fixture(scope="module")
def chained(tiny_folder, tmp_path_factory):
    """A run, a run from its model with another seed, and what the second printed."""
    first, second = (tmp_path_factory.mktemp("chained") / name for name in ("first", "second"))
    flags = {
        "num_steps": 1, "num_generations": 2, "batch_size": 1, "max_prompt_length": 700, "max_completion_length": 4,
        "data": "sample", "eval_limit": 2, "preflight": "false", "save_steps": 0, "eval_fraction": 0.1,
    }  # fmt: skip
    launch(sys.executable, **flags, model=tiny_folder, seed=3, output_dir=first)
    flags |= {"model": first, "seed": 4, "lora_r": 2, "merge_adapter": True, "output_dir": second}
    return first, second, launch(sys.executable, **flags)


def test_a_run_from_a_trained_model_holds_out_and_reports_what_neither_was_trained_on(chained):
    first, second, output = chained
    before, both = read_trained_on(first), read_trained_on(second)
    assert len(before) == 144 and before <= both == read_trained_on(second / "merged")
    assert f"{first} was trained on 144 of these questions before; none of them is held out" in output
    fresh = {q.id for q in not_among(before, read_questions("sample").questions)}
    assert {q["id"] for q in json.loads((second / "held_out.json").read_text())["questions"]} <= fresh
    asked = prepare(["--model", str(second), "--data", "sample"])[2]
    assert {q.id for q in asked.questions} == fresh and asked.left_out == 144


def test_the_profiler_script_rehearses_steps_and_draws(tiny_folder, tmp_path):
    flags = ["--model", str(tiny_folder), "--data", "sample", "--output_dir", str(tmp_path / "run")]
    flags += ["--max_prompt_length", "700", "--max_completion_length", "4", "--num_generations", "2"]
    (tmp_path / "training.yaml").write_text("num_steps: 200\n")  # not meant for a profile
    flags += ["--config", str(tmp_path / "training.yaml")]
    command = [sys.executable, "launch/profile_memory.py", "--ds", "ds_configs/zero2.json", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    for words in (
        "the worst case and 2 steps, or as many as --num_steps says",
        "Worst case rehearsed: 700 + 4 tokens",
        "step 2/2",
        "plan error",
        "memory.svg",
    ):
        assert words in result.stdout
    assert {"memory.json", "memory.svg"} <= {file.name for file in (tmp_path / "run").iterdir()}


QUIZ = {
    "labels": "A,B,C,D", "question_field": "stem", "context_field": "none", "label_field": "key",
    "answer_tag": "choice", "prefill": True,
}  # fmt: skip
FAILS_AT_TIMES = """
calls = -1  # the trial before a run is call 0

def fails_at_times(completions, **kwargs):
    global calls
    calls += 1
    return [1 / (calls - 1)] * len(completions)
"""


@pytest.fixture(scope="module")
def quizzed(tiny_folder, tmp_path_factory):
    """A run with the user's own data, labels, tags, system prompt and rewards."""
    folder = tmp_path_factory.mktemp("quizzed")
    records = [{"stem": f"What is {n} + {n}?", "key": "ABCD"[n % 4], "year": 1990 + n} for n in range(12)]
    (folder / "quiz.json").write_text(json.dumps(records))
    (folder / "prompt.txt").write_text("Reply <reasoning>...</reasoning><choice>A|B|C|D</choice>.")
    (folder / "fails.py").write_text(FAILS_AT_TIMES)
    mine, trls = (ROOT / "tests" / "data" / f"{name}_rewards.py" for name in ("my", "trl"))
    flags = {
        "model": tiny_folder, "data": folder / "quiz.json", "system_prompt": folder / "prompt.txt", **QUIZ,
        "reward_funcs": f"correctness,{mine}:concise,{mine}:cites_the_year,{folder / 'fails.py'}:fails_at_times"
        f",{trls}:last_turn,{trls}:logging,{trls}:AsyncJudge()",
        "reward_weights": "1,0.5,1,2,0.01,1,1", "log_completions": True,
        "on_reward_error": "zero", "num_steps": 2, "num_generations": 2,
        "max_completion_length": 4, "eval_limit": 2, "learning_rate": 1e-3, "output_dir": folder / "run",
    }  # fmt: skip
    return folder / "run", launch(sys.executable, **flags)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rewards_of_ones_own_are_logged_and_one_that_fails_is_told_once_and_counted(quizzed):
    folder, output = quizzed
    first, second = metrics_of(folder)
    assert (first["rewards/fails_at_times/mean"], first["reward_errors"]) == (0, 1)
    assert (second["rewards/fails_at_times/mean"], second["reward_errors"]) == (2.0, 0)  # of weight 2
    assert output.count("Warning: The reward function 'fails_at_times' raised ZeroDivisionError") == 1
    names = ("correctness", "concise", "cites_the_year", "fails_at_times", "last_turn", "logging", "AsyncJudge")
    assert second["reward"] == pytest.approx(sum(second[f"rewards/{name}/mean"] for name in names))


def test_rewards_in_trls_shapes_get_messages_and_log_what_they_like(quizzed):
    folder, output = quizzed
    assert "completions are lists of messages for last_turn (--completion_format)" in output
    lines = metrics_of(folder)
    assert all(line["rewards/last_turn/mean"] >= 0.01 * len("Question: What is 1 + 1?") for line in lines)
    assert all(line["rewards/AsyncJudge/mean"] == 1.0 and line["share"] == 0.5 for line in lines)
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert rows and all(row["first"] == row["completion"][:1] for row in rows)
    asked = json.loads((folder / "held_out.json").read_text())["questions"]
    assert all(question["after"]["rewards"]["AsyncJudge"] == 1.0 for question in asked)


def test_a_quiz_without_contexts_is_asked_in_its_own_words(quizzed):
    command = [sys.executable, "launch/ask.py", "--model", str(quizzed[0]), "--question", "What is 1 + 1?"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and "Answer:" in result.stdout, result.stderr[-2000:]


def test_a_run_is_repeated_from_the_config_it_wrote(quizzed, tmp_path):
    folder, _ = quizzed
    launch(sys.executable, config=folder / CONFIG_FILE, num_steps=1, output_dir=tmp_path / "again")
    (again,), (first, _) = metrics_of(tmp_path / "again"), metrics_of(folder)
    timed = {name for name in first if name.startswith(("seconds/", "memory/", "tokens_per", "step_time"))}
    assert {n: v for n, v in again.items() if n not in timed} == {n: v for n, v in first.items() if n not in timed}


def test_a_reward_that_fails_ends_the_run_by_name_and_line(tiny_folder, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS_AT_TIMES.replace("calls - 1", "0"))
    flags = [
        "--model",
        str(tiny_folder),
        "--data",
        "sample",
        "--reward_funcs",
        f"{tmp_path / 'fails.py'}:fails_at_times",
    ]
    flags += ["--max_prompt_length", "700", "--max_completion_length", "4", "--eval_limit", "2"]
    command = [sys.executable, "launch/train.py", *flags, "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 7 and "Traceback" not in result.stderr
    assert "'fails_at_times' raised ZeroDivisionError: division by zero (fails.py, line 7: return" in result.stderr


def letters_reward(completions, **_):
    """A task a random model can solve by chance: write small letters."""
    return [sum(c.isascii() and c.islower() for c in text) / 8 for text in completions]


def tiny_trainer(folder, console=None, **changes):
    """A trainer in this process, and its questions."""
    config = TrainConfig(
        model=str(folder), num_generations=8, batch_size=2, num_steps=40, max_completion_length=8,
        max_prompt_length=480, learning_rate=5e-3, beta=0.01, eval_limit=2,
    )  # fmt: skip
    config = replace(config, **changes)
    sizes = DsSizes(config.learning_rate, 0.0, 1.0, 0, 40, 16, 1, native="fp32")
    ds = resolve_ds_config(ROOT / "ds_configs/zero2.json", fill=sizes)
    train, held_out = split_questions(read_questions("sample").questions, eval_fraction=0.2, seed=0)
    rewards = {"letters": (letters_reward, 1.0)}
    console = console or Console(speaks=False)
    return Trainer(config, ds, ranks.start(), console, rewards), train, held_out[:2]


def test_every_long_part_of_a_run_says_how_far_it_is(tiny_folder, tmp_path, capsys):
    """In a file. The clock of this console makes a minute pass between two reads."""
    console = Console(now=map(float, count(0, 60)).__next__)
    trainer, train, held_out = tiny_trainer(
        tiny_folder, console, num_steps=1, dry_run_worst_case=True, dynamic_sampling=1, pack_tokens=500
    )
    trainer.collector.score.keywords["functions"]["letters"] = (lambda completions, **_: [1.0] * len(completions), 1.0)
    Run(trainer, train, held_out, tmp_path / "run").run()
    printed = capsys.readouterr().out
    for begins in (
        "Evaluation before training: 2 questions to do\n",
        "KL floor, sampling: 2 completions to do\n",
        "Worst case, sampling: 16 completions to do\n",
        "Step 1 of 1, sampling: 16 completions to do\n",
        "Step 1 of 1, redraw 1: 16 completions to do\n",  # all rewards are equal
        "Step 1 of 1, update: 16 completions to do\n",
        "Evaluation after training: 2 questions to do\n",
    ):
        what = begins.partition(":")[0]
        assert printed.count(begins) == 1
        assert re.search(rf"^{what}: \d+ of (\d+) .*\n(.*\n)*{what}: \1 of \1 ", printed, re.M), what


def test_a_tiny_model_learns(tiny_folder, tmp_path):
    """Mean reward rises clearly under the complete stack: sampling, packing, int8 reference, 8-bit Adam, ZeRO-2."""
    trainer, train, held_out = tiny_trainer(tiny_folder)
    first, last = Run(trainer, train, held_out, tmp_path / "run").run().quarters()
    assert last > first + 0.3


def first_step(folder, tmp_path, **changes):
    """Metrics of one step on a tiny model, and how far its weights moved."""
    trainer, train, _ = tiny_trainer(folder, num_steps=1, **changes)
    before = [p.detach().clone() for p in trainer.engine.model.parameters()]
    Run(trainer, train, [], tmp_path).train()
    moved = max(
        float((p.detach() - q).abs().max()) for p, q in zip(trainer.engine.model.parameters(), before, strict=True)
    )
    trainer.engine.close()
    return json.loads((tmp_path / "metrics.jsonl").read_text()), moved


def test_a_step_with_dapos_four_changes(tiny_folder, tmp_path):
    metrics, moved = first_step(
        tiny_folder, tmp_path, loss_type="dapo", epsilon_high=0.28, overlong_buffer=4, dynamic_sampling=2,
        scale_rewards="batch", beta=0.0,
    )  # fmt: skip
    assert moved > 0
    assert 0 < metrics["entropy"] < math.log(259)
    assert -1 <= metrics["rewards/overlong/mean"] < 0  # a random model writes to the limit nearly always
    assert metrics["reward"] == pytest.approx(metrics["rewards/letters/mean"] + metrics["rewards/overlong/mean"])
    assert metrics["kl"] == 0 and metrics["redrawn"] == 0 and metrics["frac_reward_zero_std"] == 0


def test_truncated_completions_neither_train_nor_count(tiny_folder, tmp_path):
    metrics, moved = first_step(tiny_folder, tmp_path, max_completion_length=2, mask_truncated_completions=True)
    assert metrics["completions/clipped_ratio"] == 1  # none ends within two tokens: nothing to train on
    assert moved == metrics["grad_norm"] == metrics["loss"] == metrics["entropy"] == 0


class FailsOnce:
    """A GPU that runs out of memory once, on a machine without one."""

    def __init__(self, calls_before: int) -> None:
        self.left = calls_before

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def test_a_phase_that_ran_out_of_memory_is_retried_in_smaller_parts_with_the_same_results(tiny_folder, tmp_path):
    runs = []
    for fails in (False, True):
        trainer, train, _ = tiny_trainer(tiny_folder, num_steps=3, mu=2, learning_rate=1e-3, oom_retry=fails)
        if fails:
            layer = trainer.engine.model.model.layers[0]
            layer.register_full_backward_hook(FailsOnce(calls_before=1))  # the second update of the first step
            layer.register_forward_pre_hook(FailsOnce(calls_before=14))  # after measuring the floor: a decoding step
        (tmp_path / str(fails)).mkdir()
        rewards = Run(trainer, train, [], tmp_path / str(fails)).train()
        runs.append((rewards, [p.detach().clone() for p in trainer.engine.model.parameters()], trainer.limits))
        trainer.engine.close()
    (rewards, weights, _), (rewards_again, weights_again, limits) = runs
    assert (limits.rows, limits.tokens) == (8, 536)
    assert rewards_again == pytest.approx(rewards)
    for one, two in zip(weights, weights_again, strict=True):
        torch.testing.assert_close(two, one, atol=3e-4, rtol=0)  # steps are 1e-3; sums are in another order


def test_a_reference_that_does_not_fit_is_not_tried_again_with_smaller_limits(tiny_folder, monkeypatch):
    """Smaller parts make no smaller copy, and checkpoints would keep the smaller limits."""
    trainer, train, _ = tiny_trainer(tiny_folder, num_steps=1, oom_retry=True)
    limits, tried = replace(trainer.limits), []

    def full(*_):
        tried.append("once")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr("grpo_ds.training.trainer.make_reference", full)
    with pytest.raises(OutOfMemory, match="in phase 'reference'"):
        trainer.make_reference(train)
    assert tried == ["once"] and trainer.limits == limits
    trainer.engine.close()


def test_without_the_flag_the_phase_and_what_helps_are_named(tiny_folder, tmp_path):
    trainer, train, _ = tiny_trainer(tiny_folder, num_steps=1)
    trainer.engine.model.model.layers[0].register_full_backward_hook(FailsOnce(calls_before=0))
    with pytest.raises(OutOfMemory, match="in phase 'update'"):
        Run(trainer, train, [], tmp_path).train()
