"""Before a run starts: mistakes are reported at once, in six lines at most, and nothing is written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from grpo_ds.commands.settle import settle
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.memory.choose import choose_model
from grpo_ds.memory.select import Job, fits
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import EvaluateConfig, TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.settings.saved_config import CONFIG_FILE, prompt_recipe, write_config
from grpo_ds.system import hardware
from grpo_ds.task.answers import AnswerFormat

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"question": "Does it work?", "context": "It worked.", "ground_truth": "yes"}


def launch(*words, script="train.py", cwd=ROOT):
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def json_file(folder, value, name="data.json"):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ("[{", ["line 1"]),
        ([{"question": "Q?", "context": "C."}], ["record 1", "ground_truth"]),
        ([{**GOOD, "ground_truth": "perhaps"}], ["record 1", "perhaps", "yes"]),
        ([{**GOOD, "context": " "}], ["record 1", "context"]),
        ([GOOD, GOOD], ["record 2"]),
    ],
)
def test_bad_data_is_named_and_nothing_is_written(tmp_path, records, words):
    result = launch("--data", json_file(tmp_path, records), "--output_dir", tmp_path / "run")
    check(result, 3, words)
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_is_named(tmp_path):
    check(launch("--data", tmp_path / "none.json"), 3, ["none.json"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_stepz", "3"], ["--num_stepz", "did you mean --num_steps"]),
        (["--learning-rat", "1"], ["did you mean --learning_rate"]),
        (["--num_generations", "1"], ["num_generations", "compares completions of a group"]),
        (["--num_steps", "many"], ["num_steps", "many"]),
        (["--reference", "int4"], ["reference", "int8"]),
        (["--num_generations", "1", "--temperature", "0", "--mu", "0"], ["num_generations", "temperature", "mu"]),
        (["--report_to", "tensorbored"], ["tensorbored", "wandb"]),
        (["--ds", "nowhere.json"], ["nowhere.json", "zero2.json"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--reward_funcs", "correctnes"], ["correctnes", "repetition_penalty", "FILE.py:FUNCTION"]),
        (["--reward_funcs", "nowhere.py:concise"], ["nowhere.py:concise", "no file", "docs/rewards.md"]),
        (["--reward_weights", "1"], ["reward_weights", "3 numbers"]),
        (["--on_reward_error", "skip"], ["on_reward_error", "stop, zero"]),
        (["--reward_timeout", "-1"], ["reward_timeout"]),
        (["--labels", "A,B", "--few_shot", "3"], ["few_shot is 3, but 2 worked examples exist", ": --few_shot 2"]),
        (["--labels", "A,a"], ["labels"]),
        (["--answers", "numbers"], ["answers", "labels, number, text, none"]),
        (["--answers", "number", "--labels", "A,B"], ["labels is A,B, but answers is number: leave one of them out"]),
        (["--units", "$"], ["units is $, but answers is labels", "--answers number"]),
        (["--answers", "number", "--units", "$,5,<b>"], ["units: '5', '<b>' would be read as a part of the number"]),
        (["--answers", "number", "--few_shot", "3"], ["2 worked examples exist for answers number: --few_shot 2"]),
        (["--answers", "text", "--answer_reward", "expected"], ["answer_reward expected needs labels", "text"]),
        (
            ["--answers", "number", "--reward_funcs", "correctness,reasoning_gain,bare_label"],
            ["reward_funcs has reasoning_gain and bare_label, for labels alone, but answers is number"],
        ),
        (["--answers", "number", "--eval_misled"], ["eval_misled claims another label, but answers is number"]),
        (["--answers", "none"], ["reward_funcs has correctness, but answers is none", "FILE.py:FUNCTION"]),
        (
            ["--answers", "none", "--reward_funcs", "format", "--eval_samples", "4", "--prefill", "--few_shot", "1"],
            ["eval_samples", "prefill begins an answer", "0 worked examples exist for answers none: --few_shot 0"],
        ),
        (["--answer_tag", "<answer>"], ["answer_tag", "without its brackets"]),
        (["--answer_tag", "reasoning"], ["must differ"]),
        (["--system_prompt", "nowhere.txt"], ["system_prompt", "nowhere.txt"]),
        (["--lora_r", "-1", "--lora_alpha", "0", "--lora_target", "a,,b"], ["lora_r", "lora_alpha", "q_proj,v_proj"]),
        (["--lora_r", "8", "--lora_target", "lm_head"], ["lm_head", "down_proj", "all-linear"]),
        (["--lora_r", "8", "--reference", "bf16"], ["reference is bf16", "the policy's own base"]),
        (["--load_in_4bit"], ["load_in_4bit", "--lora_r 16"]),
        (["--load_in_4bit", "--load_in_8bit", "--lora_r", "8"], ["exclude each other"]),
        (["--merge_adapter"], ["merge_adapter", "--lora_r 16"]),
        (["--sync_ref_model"], ["0.6", "8 bits", "--reference bf16", "--ref_model_mixup_alpha 1"]),
        (["--sync_ref_model", "--lora_r", "8"], ["0.6", "no adapter of that rank", "--ref_model_mixup_alpha 1"]),
        (["--sync_ref_model", "--beta", "0"], ["sync_ref_model", "beta 0"]),
        (["--ref_model_mixup_alpha", "1.5", "--ref_model_sync_steps", "0"], ["1.5", "ref_model_sync_steps"]),
    ],
)
def test_bad_flags_are_named(flags, words):
    check(launch(*flags), 2, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, ["stage", "3", "2"]),
        ({"zero_optimizaton": {"stage": 2}}, ["zero_optimizaton", "zero_optimization"]),
    ],
)
def test_a_bad_deepspeed_json_is_named(tmp_path, change, words):
    check(launch("--ds", json_file(tmp_path, change, "ds.json")), 2, words)


def test_a_folder_that_holds_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    check(launch("--output_dir", tmp_path), 2, ["already holds"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_without_a_key_is_refused_before_the_model(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    check(launch("--report_to", "wandb"), 2, ["WANDB_API_KEY", "WANDB_MODE=offline"])


@pytest.mark.parametrize(
    ("report_to", "words"),
    [
        ("wandb,none", ["wandb,none", "none cannot be combined"]),
        ("csv,wandb", ["report_to names csv", "tensorboard, trackio"]),
    ],
)
def test_unknown_trackers_are_named(report_to, words):
    check(launch("--report_to", report_to), 2, words)


def test_the_saved_config_names_the_default_data(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_config(settle(["--model", EMBEDDED]).config, tmp_path)
    assert "data: sample\n" in (tmp_path / CONFIG_FILE).read_text()


def test_a_hub_that_cannot_be_reached_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a port without a server
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    result = launch("--model", "qwen2.5-0.5b", "--output_dir", tmp_path / "run")
    check(result, 2, ["qwen2.5-0.5b", "--model", EMBEDDED])
    assert "Retry" not in result.stderr  # the hub's own client would try six times
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate_model.py", "ask.py"])
def test_help_lists_the_flags(script):
    result = launch("--help", script=script)
    assert result.returncode == 0 and "--max_completion_length" in result.stdout


def test_asking_nothing_says_what_is_missing():
    check(launch("--question", "Why?", script="ask.py"), 2, ["--context"])


def test_rewards_are_checked_against_the_data_before_a_model_is_loaded(tmp_path):
    rewards = f"{ROOT / 'tests/data/my_rewards.py'}:cites_the_year"
    flags = ["--data", json_file(tmp_path, [GOOD]), "--model", EMBEDDED, "--reward_funcs", rewards]
    check(launch(*flags, "--output_dir", tmp_path / "run"), 2, ["asks for 'year'", "question, context, label"])
    assert not (tmp_path / "run").exists()


def test_a_model_is_asked_as_it_was_trained(tmp_path):
    """The config beside a model holds its labels, tags, fields and system prompt, wherever the folder is moved."""
    prompt = json_file(tmp_path, " Be brief.\n", "prompt.txt")
    asked = TrainConfig(
        model="base", labels="A,B", reasoning_tag="think", answer_tag="choice", system_prompt=str(prompt),
        context_field="none", question_field="stem", label_field="key", output_dir="elsewhere", num_steps=7,
    )  # fmt: skip
    folder = tmp_path / "made"
    folder.mkdir()
    write_config(asked, folder)
    prompt.unlink()
    folder = folder.rename(tmp_path / "moved")
    config = parse(EvaluateConfig, ["--model", str(folder)], about="").config(prompt_recipe(folder))
    assert config.answer_format == asked.answer_format == AnswerFormat(("A", "B"), "think", "choice")
    assert config.system_prompt_text == "Be brief."
    assert config.field_names == {"question": "stem", "context": "none", "label": "key"}
    assert config.model == str(folder)


def test_the_written_config_makes_the_same_run_in_a_folder_of_its_own(tmp_path):
    reward_funcs, weights = "correctness,/mine/my_rewards.py:concise", "1,0.5"
    asked = TrainConfig(labels="A,B", reward_funcs=reward_funcs, reward_weights=weights, beta=0.0, learning_rate=3e-6)
    write_config(replace(asked, output_dir="taken"), tmp_path)
    again = parse(TrainConfig, ["--config", str(tmp_path / CONFIG_FILE)], about="").config()
    assert again == asked


def test_numbers_that_the_json_decides_are_written_as_the_run_uses_them(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    value = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    value["optimizer"]["params"]["lr"] = 5e-6
    ds = ["--ds", str(json_file(tmp_path, value, "ds.json")), "--model", EMBEDDED]
    write_config(settle(ds).config, tmp_path)
    again = settle(["--config", str(tmp_path / CONFIG_FILE)])
    assert again.config.learning_rate == again.job.ds.learning_rate == 5e-6


WORKED = {  # file in configs/ -> its machine: GiB of GPU memory and of RAM
    "qwen2.5-1.5b-16gb.yaml": (16, 32),
    "qwen2.5-3b-24gb.yaml": (24, 32),
    "gsm8k-1.5b-16gb.yaml": (16, 32),
    "medqa-1.5b-16gb.yaml": (16, 32),
    "smollm2-laptop.yaml": (0, 8),
    "summaries-laptop.yaml": (0, 8),
}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_train_accepts_a_worked_config(file):
    assert parse(TrainConfig, ["--config", str(file)], about="").config().model in PRESETS


@pytest.mark.parametrize(("name", "machine"), WORKED.items())
def test_a_worked_config_fits_the_machine_it_names(name, machine):
    gpu_gib, ram_gib = machine
    config = parse(TrainConfig, ["--config", str(ROOT / "configs" / name)], about="").config()
    ds = resolve_ds_config(ROOT / config.ds, fill=config.ds_sizes(native="bf16" if gpu_gib else "fp32"))
    job = Job(shape_of(config.model), config, ds, "cuda" if gpu_gib else "cpu")
    assert fits(job.plan(), gpu_gib, ram_gib)


def test_a_reward_function_with_a_mistake_ends_the_run_before_a_model_is_loaded_and_takes_no_folder(tmp_path):
    (tmp_path / "mine.py").write_text("def short(completions, **_):\n    return [0.0] * (len(completions) - 1)\n")
    flags = ["--reward_funcs", f"format,{tmp_path / 'mine.py'}:short", "--data", "sample"]
    result = launch(*flags, "--output_dir", tmp_path / "run", "--batch_size", 1, "--num_generations", 4)
    check(result, 7, ["'short' returned 3 values for 4 completions", "nothing was written"])
    assert not (tmp_path / "run").exists() and "Model:" not in result.stdout


def check(result, code, words):
    message = result.stderr.strip()
    assert result.returncode == code, result.stdout + message
    assert "Traceback" not in message
    assert len([line for line in message.splitlines() if "Warning" not in line]) <= MAX_LINES, message
    for word in words:
        assert word in message, message


def test_checks_before_a_run_load_nothing_heavy():
    """Arguments, data and JSON are checked before torch and similar libraries are imported."""
    code = (
        "import sys; sys.argv = ['train.py']; from grpo_ds.commands.settle import settle; "
        "from grpo_ds.task.questions import read_questions; settle([]); read_questions('sample'); "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_a_yaml_file_and_flags_go_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_steps: 7\nbeta: 0.1\n")
    parsed = parse(TrainConfig, ["--config", str(path), "--beta", "0", "--local_rank=0"], about="")
    assert (parsed.config().num_steps, parsed.config().beta) == (7, 0.0)
    assert parsed.typed == {"num_steps", "beta"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_stepz: 3\n", ["--config", "num_stepz", "did you mean num_steps"]),
        ("num_steps: many\n", ["num_steps", "many"]),
        ("reward_funcs: a\nmu: 0\n", ["reward_funcs: 'a'", "mu must be"]),
        ("num_steps: [\n", ["is not YAML", "line 2"]),
    ],
)
def test_what_is_wrong_in_a_yaml_file_is_named(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse(TrainConfig, ["--config", str(path)], about="").config()
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert len(str(caught.value).splitlines()) <= MAX_LINES


def test_a_recipe_gives_way_to_what_was_typed():
    config = parse(TrainConfig, ["--few_shot", "0"], about="").config({"few_shot": 2, "prefill": True})
    assert (config.few_shot, config.prefill) == (0, True)


@pytest.mark.parametrize(
    ("gpu_gib", "ram_gib", "model"),
    [
        (None, 32, EMBEDDED),
        (16, 32, "qwen2.5-1.5b"),  # 3B fits the GPU, but not 32 GB of RAM
        (24, 64, "qwen2.5-3b"),
        (16, 16, "qwen2.5-0.5b"),
        (80, 256, "qwen2.5-7b"),
        (2, 32, EMBEDDED),
    ],
)
def test_auto_takes_the_largest_qwen_that_fits(gpu_gib, ram_gib, model):
    assert choose_model("auto", gpu_gib=gpu_gib, ram_gib=ram_gib).model == model


@pytest.mark.parametrize(
    "flags",
    [
        ["--sync_ref_model", "--reference", "bf16"],
        ["--sync_ref_model", "--reference", "bf16-cpu", "--ref_model_mixup_alpha", "0.1"],
        ["--sync_ref_model", "--ref_model_mixup_alpha", "1"],
        ["--sync_ref_model", "--ref_model_mixup_alpha", "1", "--lora_r", "8", "--load_in_8bit", "--merge_adapter"],
        ["--lora_r", "16", "--lora_target", "q_proj, v_proj"],
    ],
)
def test_references_and_adapters_that_go_together(flags):
    assert not parse(TrainConfig, flags, about="").config().problems()


SGD = "ds_configs/zero2_sgd.json"


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 1e-6),
        (["--lora_r", "8"], 1e-5),  # an adapter needs ten times the rate
        (["--lora_r", "8", "--learning_rate", "3e-6"], 3e-6),  # a typed flag wins
        (["--model", EMBEDDED], 1.5e-5),
        (["--model", EMBEDDED, "--lora_r", "8"], 1.5e-4),
        (["--ds", SGD], 1e-3),
        (["--ds", SGD, "--model", EMBEDDED], 1.5e-2),
        (["--ds", SGD, "--learning_rate", "0.02"], 0.02),
    ],
)
def test_an_adapter_and_sgd_have_learning_rates_of_their_own(flags, rate, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: True)  # which SGD's JSON asks for
    settled = settle(["--model", "qwen2.5-0.5b", *flags])
    assert settled.config.learning_rate == pytest.approx(rate) == settled.job.ds.learning_rate
    assert not [line for line in settled.warnings if "SGD" in line]


def test_adams_learning_rate_for_sgd_is_warned_of(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: True)
    settled = settle(["--model", "qwen2.5-0.5b", "--ds", SGD, "--learning_rate", "1e-6"])
    assert any("Leave --learning_rate out, which takes 0.001." in line for line in settled.warnings)


def test_an_adapter_on_an_adapter_is_refused_before_anything_is_loaded(tmp_path):
    json_file(tmp_path, {"base_model_name_or_path": "qwen2.5-0.5b"}, "adapter_config.json")
    check(launch("--model", tmp_path, "--lora_r", "8"), 2, ["is an adapter on qwen2.5-0.5b", "--merge_adapter"])
    json_file(tmp_path, {}, "adapter_config.json")
    check(launch("--model", tmp_path), 2, ["names no base model", str(tmp_path)])


def test_more_tokens_than_learned_positions_are_refused(tmp_path):
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "vocab_size": 272}
    json_file(tmp_path, {"model_type": "gpt2", **shape}, "config.json")
    check(launch("--model", tmp_path, "--plan"), 2, ["1024 positions", "1068", "--max_prompt_length 724"])
    assert launch("--model", tmp_path, "--plan", "--max_prompt_length", "724").returncode == 0


def test_with_an_adapter_on_four_bits_a_larger_model_fits():
    config = TrainConfig(lora_r=16, load_in_4bit=True)
    ds = resolve_ds_config(ROOT / config.ds, fill=config.ds_sizes(native="bf16"))
    assert choose_model("auto", gpu_gib=16, ram_gib=32, run=lambda: (config, ds)).model == "qwen2.5-7b"


def test_several_wrong_values_raise_one_error():
    with pytest.raises(UsageError) as caught:
        parse(TrainConfig, ["--mu", "0", "--batch_size", "0"], about="").config()
    assert "mu" in str(caught.value) and "batch_size" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss_type ppo", ["loss_type", "gspo", "cispo"]),
        ("--kl_estimator k4", ["kl_estimator", "k3_corrected"]),
        ("--scale_rewards std", ["scale_rewards", "batch"]),
        ("--epsilon_high 0", ["epsilon_high is 0"]),
        ("--epsilon_high .nan", ["epsilon_high is '.nan'"]),
        ("--delta 1.2", ["delta is 1.2", "1 + epsilon_high, 1.2"]),
        ("--delta 1.5 --epsilon_high 0.6", ["1 + epsilon_high, 1.6"]),
        ("--delta 4 --loss_type cispo", ["delta", "cispo"]),
        ("--epsilon 0.1 --epsilon_high 0.3 --loss_type sapo", ["epsilon has no effect with sapo", "epsilon_high has"]),
        (
            "--multi_objective_aggregation normalize_then_sum --scale_rewards none --format_reward 1",
            ["scale_rewards none has no effect with normalize_then_sum", "format_reward 1.0 has", "--reward_weights"],
        ),
        ("--top_entropy_quantile 20", ["top_entropy_quantile is 20; it must be a share between 0 and 1"]),
        ("--sapo_temperature_neg 2", ["sapo_temperature_neg has no effect with grpo: leave it out"]),
        ("--vespo_k_pos 1 --loss_type sapo", ["vespo_k_pos has no effect with sapo"]),
        ("--vespo_lambda_neg 0 --loss_type vespo", ["vespo_lambda_neg is 0; it must be more than 0"]),
        ("--overlong_buffer -1", ["overlong_buffer is -1", "max_completion_length"]),
        ("--overlong_buffer 301", ["overlong_buffer is 301"]),
        ("--overlong_penalty -1", ["overlong_penalty must be 0 or more"]),
        ("--dynamic_sampling -1", ["dynamic_sampling must be 0 or more"]),
        ("--balance_classes maybe", ["balance_classes", "maybe"]),
    ],
)
def test_wrong_settings_of_the_algorithm_are_named(flags, words):
    with pytest.raises(UsageError) as caught:
        parse(TrainConfig, flags.split(), about="").config()
    message = str(caught.value)
    assert all(word in message for word in words) and len(message.splitlines()) <= MAX_LINES, message


@pytest.mark.parametrize(("flags", "high"), [("--epsilon 0.1", 0.1), ("--epsilon 0.1 --epsilon_high 0.3", 0.3)])
def test_the_upper_bound_is_the_lower_one_unless_given(flags, high):
    objective = parse(TrainConfig, flags.split(), about="").config().objective
    assert (objective.epsilon, objective.epsilon_high) == (0.1, high)


def test_the_plan_is_printed_and_nothing_else_is_done(tmp_path):
    result = launch("--plan", "--model", "qwen2.5-1.5b", "--output_dir", tmp_path / "run", "--num_generations", "8")
    assert result.returncode == 0, result.stderr
    for words in ("master weights", "initialise", "KV cache", "Memory plan:"):
        assert words in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_names_changes(tmp_path):
    result = launch("--plan", "--model", "qwen2.5-7b")
    assert result.returncode == 0 and "does not fit" in result.stdout


def test_print_config_writes_every_setting_as_yaml():
    result = launch("--num_steps", "7", "--print_config")
    assert result.returncode == 0 and yaml.safe_load(result.stdout)["num_steps"] == 7, result.stderr


def test_the_examples_of_a_recipe_are_those_that_fit_the_labels():
    recipe = PRESETS[EMBEDDED].recipe

    def examples(labels):
        return parse(TrainConfig, ["--labels", labels], about="").config(recipe).few_shot

    assert [examples(labels) for labels in ("yes,no", "yes,unsure", "A,B,C,D")] == [2, 2, 2]


def test_characters_that_the_locale_cannot_show_end_no_command(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / "launch/train.py"), "--data", str(tmp_path / "\u2265.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 3 and "\\u2265.json" in result.stderr and "Traceback" not in result.stderr
