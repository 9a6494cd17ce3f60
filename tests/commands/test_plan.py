"""`train --plan`: for another machine, and for the prompts of the data that it is given."""

import json

import pytest

from grpo_ds.commands import train
from grpo_ds.errors import DataError, UsageError
from grpo_ds.models.presets import PRESETS

RECORD = {"question": "Does it help?", "context": "It helped.", "ground_truth": "yes"}
SMALL = ["--plan", "--num_generations", "2", "--max_prompt_length", "1500"]


@pytest.fixture
def plan(capsys):
    def run(*words):
        train.main(list(map(str, words)))
        return capsys.readouterr().out

    return run


def test_it_is_of_the_machine_that_is_named(plan):
    words = ("--plan", "--model", "qwen2.5-3b", "--ds", "ds_configs/zero2_lowram.json")
    assert "10.7 of about 12.0 GiB of GPU memory (update), 25.6 of 32.0 GiB of RAM" in plan(
        *words, "--gpu_gib", 12, "--ram_gib", 32
    )
    small = plan(*words, "--gpu_gib", 8, "--ram_gib", 16)
    assert "does not fit" in small and "of 16.0 GiB of RAM" in small
    assert "GPU memory" not in plan("--plan", "--gpu_gib", 0, "--ram_gib", 16)


def test_all_parameters_of_7b_take_a_24_gb_card_beside_64_gb_of_ram(plan):
    """The smallest machine for it, as docs/memory.md says; the 8-bit residual saves a byte a parameter."""
    for name, ram in ("lowram", 59.5), ("lowram7", 52.4):
        words = ("--plan", "--model", "qwen2.5-7b", "--ds", f"ds_configs/zero2_{name}.json", "--reference", "streamed")
        shown = plan(*words, "--gpu_gib", 24, "--ram_gib", 64)
        assert f"17.2 of about 24.0 GiB of GPU memory (update), {ram} of 64.0 GiB of RAM" in shown


def test_only_a_plan_is_of_another_machine():
    with pytest.raises(UsageError, match="--gpu_gib is for the plan of another machine"):
        train.main(["--model", "qwen2.5-3b", "--gpu_gib", "12"])


def test_it_reads_the_data_it_is_given(plan, tiny_folder, tmp_path):
    file = tmp_path / "mine.jsonl"
    records = [RECORD, {**RECORD, "question": "Does it help as well?", "context": "It helped. " * 20}]
    file.write_text("\n".join(map(json.dumps, records)))
    shown = " ".join(plan(*SMALL, "--model", tiny_folder, "--data", file).split())
    # A token for each byte: the longest prompt is the template, the system prompt, and 220 + 42 bytes more.
    assert "planned for its longest prompt, " in shown and "(--max_prompt_length 1500)" in shown
    tokens = int(shown.split("its longest prompt, ")[1].split()[0])
    shorter = " ".join(plan(*SMALL, "--model", tiny_folder, "--data", one_of(tmp_path, records[0])).split())
    assert tokens - int(shorter.split("its longest prompt, ")[1].split()[0]) == len(" as well") + len(
        "It helped. " * 20
    ) - len("It helped. ")


def one_of(folder, record):
    file = folder / "one.json"
    file.write_text(json.dumps([record, {**record, "question": "Is it?"}]))
    return file


def test_a_model_whose_tokenizer_is_elsewhere_is_planned_for_the_longest_allowed_prompts(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    shown = " ".join(plan("--plan", "--model", "qwen2.5-0.5b", "--data", one_of(tmp_path, RECORD)).split())
    assert "2 questions" in shown and "planned for prompts of 768 tokens" in shown and "Memory plan:" in shown


def test_data_that_cannot_be_used_is_an_error(tmp_path):
    with pytest.raises(DataError, match="record 1"):
        train.main(["--plan", "--model", "qwen2.5-0.5b", "--data", str(one_of(tmp_path, {"question": "Q?"}))])
    assert "qwen2.5-0.5b" in PRESETS
