"""A shape is read from the config alone and counts exactly the parameters that transformers builds."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_ds.commands import ask, evaluate, select
from grpo_ds.commands.settle import settle
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.models import shapes
from grpo_ds.models.presets import PRESETS
from grpo_ds.models.quantized import Int8Embedding, Int8Linear, Int8Rows, quantize
from grpo_ds.models.shapes import (
    PRESET_CONFIGS,
    ModelShape,
    longer_than_made_for,
    meta_shape,
    qwen25,
    scale_group,
    shape_of,
)
from tests.conftest import check_example

SMALL = {**qwen25(96, 3, 6, 2, 160, vocab=512), "head_dim": 16}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 300, "n_inner": None}
OPT = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 100},
    **{"word_embed_proj_dim": 64, "max_position_embeddings": 128},
}
GEMMA3N = {
    **{"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    **{"vocab_size": 60, "vocab_size_per_layer_input": 60, "intermediate_size": 64, "max_position_embeddings": 50},
    **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4},
}
CONFIGS = {
    **PRESET_CONFIGS,
    "qwen2 untied": {**SMALL, "tie_word_embeddings": False},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 32},  # heads wider than the residual stream
    "qwen3 untied": {**SMALL, "model_type": "qwen3", "tie_word_embeddings": False, "attention_bias": True},
    "llama": {**SMALL, "model_type": "llama"},
    "llama with biases": {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**SMALL, "model_type": "mistral", "tie_word_embeddings": False},
    "gpt2": {**GPT2, "model_type": "gpt2"},
    "gpt2 untied, wide": {**GPT2, "model_type": "gpt2", "n_inner": 100, "tie_word_embeddings": False},
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def folder_with(config, folder):
    """Write config.json as save_pretrained does."""
    AutoConfig.for_model(**config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_counts_what_transformers_builds(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "meta_shape", None)  # the quick way alone
    shape, model = shape_of(folder_with(config, tmp_path)), on_meta(config)
    parameters = list(model.parameters())
    assert shape.parameters == sum(p.numel() for p in parameters)
    assert shape.vectors == sum(p.numel() for p in parameters if p.dim() == 1)
    assert shape.largest == max(p.numel() for p in parameters)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_size(name):
    assert shape_of(name).parameters == PRESETS[name].parameters


def test_an_unknown_family_is_counted_on_the_meta_device(tmp_path):
    config = {
        **{"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 64, "vocab_size": 100, "tie_word_embeddings": False},
    }
    shape = shape_of(folder_with(config, tmp_path))
    assert shape.parameters == sum(p.numel() for p in on_meta(config).parameters())
    assert (shape.layers, shape.hidden, shape.tied) == (2, 32, False)


def test_both_ways_of_counting_agree():
    quick, exact = shape_of("qwen2.5-0.5b"), meta_shape("qwen2.5-0.5b", PRESET_CONFIGS["qwen2.5-0.5b"])
    numbers = ("vocab", "hidden", "mlp", "layers", "heads", "kv_heads", "head_dim", "tied", "vectors", "parameters")
    assert [getattr(quick, n) for n in numbers] == [getattr(exact, n) for n in numbers]
    assert quick.int8_bytes(2) == exact.int8_bytes(2)


def test_an_int8_reference_has_the_bytes_of_the_real_layers(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL), dtype=torch.bfloat16)
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            seen.add(module.weight.data_ptr())
            made: Int8Rows = Int8Embedding(module.weight)
        elif isinstance(module, torch.nn.Linear) and module.weight.data_ptr() not in seen:
            made = Int8Linear(module.weight, module.bias)
        else:
            total += sum(p.nbytes for p in module.parameters(recurse=False) if p.data_ptr() not in seen)
            continue
        total += sum(buffer.nbytes for buffer in made.buffers())
    assert shape_of(folder_with(SMALL, tmp_path)).int8_bytes(2) == total


@pytest.mark.parametrize(("width", "group"), [(64, 64), (576, 64), (96, 32), (48, 16), (100, 100), (33, 33)])
def test_the_scales_of_a_layer_are_those_that_the_plan_counts(width, group):
    _, scales = quantize(torch.ones(2, width))
    assert scale_group(width) == group and scales.shape == (2, width // group)


def test_the_example_of_a_data_class_is_right():
    check_example(ModelShape)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"model_type": "no_such_model"}), json.dumps({"x": 1})])
def test_a_config_that_says_nothing_is_an_error_with_the_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError) as error:
        shape_of(str(tmp_path))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) <= MAX_LINES


IMPOSSIBLE = [
    ({**SMALL, "num_attention_heads": 0}, "num_attention_heads is 0"),
    ({**SMALL, "vocab_size": "272"}, 'vocab_size is "272"'),
    ({**SMALL, "hidden_size": 9.5}, "hidden_size is 9.5"),
    ({**GPT2, "model_type": "gpt2", "n_layer": -1}, "n_layer is -1"),
    ({**OPT, "model_type": "opt", "num_attention_heads": True}, "num_attention_heads is true"),
]


@pytest.mark.parametrize(("config", "words"), IMPOSSIBLE)
def test_an_impossible_size_is_named(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="gives sizes that no model has") as error:
        shape_of(str(tmp_path))
    assert words in str(error.value) and len(str(error.value).splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("base", "fault"), [("gone", "is not there"), ("empty", "without config.json"), ("adapter", "is an adapter itself")]
)
def test_an_adapter_whose_base_is_not_there_says_who_names_it(tmp_path, base, fault):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / base)}))
    with pytest.raises(UsageError, match=fault) as error:
        shape_of(str(folder))
    assert all(word in str(error.value) for word in (str(folder), "adapter_config.json", "base_model_name_or_path"))


def test_a_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        shape_of(str(tmp_path))


ROTARY = {**SMALL, "max_position_embeddings": 100}


def scaled(kind, factor, **more):
    return {**ROTARY, "rope_scaling": {"rope_type": kind, "factor": factor, **more}}


LIMITS = [  # config, tokens that the model was made for, positions learned
    (ROTARY, 100, False),
    (scaled("yarn", 4.0, original_max_position_embeddings=100), 400, False),
    (scaled("linear", 2.0), 200, False),
    (scaled("llama3", 8.0, original_max_position_embeddings=10), 100, False),  # Llama 3.1 names the result itself
    ({**GPT2, "model_type": "gpt2"}, 64, True),
    ({**OPT, "model_type": "opt"}, 128, True),
    ({**GEMMA3N, "model_type": "gemma3n_text"}, 50, False),  # rotary; its per-layer embeddings have 60 rows
    ({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}, None, False),  # ALiBi
]


@pytest.mark.parametrize(("config", "positions", "learned"), LIMITS)
def test_a_shape_knows_how_long_a_row_may_be(tmp_path, config, positions, learned):
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert (shape.positions, shape.learned_positions) == (positions, learned)


def longer(shape, prompt, completion):
    return longer_than_made_for(shape, prompt, completion)


def test_longer_rows_than_the_model_was_made_for_are_a_warning_with_numbers_and_a_flag(tmp_path):
    shape = shape_of(folder_with(ROTARY, tmp_path))
    assert longer(shape, 70, 30) is None
    warning = longer(shape, 70, 31)
    assert all(word in warning for word in ("Warning", "100", "101", "--max_prompt_length 69"))
    assert longer(shape, 69, 31) is None
    assert "--max_prompt_length 50 --max_completion_length 50" in longer(shape, 1, 100)


@pytest.mark.parametrize("config", [{**GPT2, "model_type": "gpt2"}, {**OPT, "model_type": "opt"}])
def test_longer_rows_than_learned_positions_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    with pytest.raises(UsageError, match=f"learned {shape.positions} positions") as error:
        longer(shape, shape.positions, 1)
    key = "n_positions" if config["model_type"] == "gpt2" else "max_position_embeddings"
    assert f"--max_prompt_length {shape.positions - 1}" in str(error.value) and f"({key})" in str(error.value)


def test_commands_say_it_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    """The folders hold no weights, so that loading ends the command."""
    for name, config in ("rotary", ROTARY), ("learned", {**GPT2, "model_type": "gpt2"}):
        (tmp_path / name).mkdir()
        folder_with(config, tmp_path / name)
    words = ["--max_prompt_length", "90", "--max_completion_length", "20"]
    (warning,) = settle(["--model", str(tmp_path / "rotary"), *words]).warnings
    assert "made for 100 tokens" in warning
    select.main(["--model", str(tmp_path / "rotary"), *words, "--gpu_gib", "0"])
    assert "made for 100 tokens" in capsys.readouterr().err
    with pytest.raises(UsageError, match="learned 64 positions"):
        select.main(["--model", str(tmp_path / "learned"), *words, "--gpu_gib", "0"])
    for main, more in (evaluate.main, ["--data", "sample"]), (ask.main, ["--question", "Q?", "--context", "C."]):
        for name, told in ("rotary", "cannot be loaded"), ("learned", "learned 64 positions"):
            with pytest.raises(UsageError, match=told):
                main(["--model", str(tmp_path / name), *words, *more])
        printed = capsys.readouterr()
        assert "made for 100 tokens" in printed.out + printed.err and "made for" not in printed.out * (main is ask.main)
