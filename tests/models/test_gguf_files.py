"""A GGUF file is a model like any other: its weights, its tokenizer and its chat template, converted once."""

import importlib.util

import pytest
import torch

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.models import gguf_files
from grpo_ds.models.gguf_files import gguf_folder, is_gguf
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.models.shapes import shape_of
from tests.tiny import CHATML, make_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


def write_gguf(file, model, *, architecture="qwen2", head=None, parts=1):
    """Write a tiny Qwen2 as llama.cpp's converter does, in fp32. head: the head beside the embedding, None: tied."""
    import gguf

    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    known = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ĠĠ"]  # a file needs a merge: two spaces
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*known, *(f"[PAD{id}]" for id in range(len(known), config.vocab_size))])
    ordinary, control, unused = (
        int(kind) for kind in (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED)
    )
    writer.add_token_types(
        [ordinary] * 256 + [control] * (len(known) - 256) + [unused] * (config.vocab_size - len(known))
    )
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHATML)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    if head is not None:
        weights["lm_head.weight"] = head
    for name, weight in weights.items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_model):
    return tiny_model.to(torch.bfloat16).float()  # bf16 holds its weights


@pytest.mark.parametrize("head", ["none", "a copy of the embedding", "another"])
def test_a_file_gives_the_model_the_tokenizer_and_the_tie_that_it_was_made_from(tmp_path, model, head):
    embedding = model.get_input_embeddings().weight.detach()
    heads = {"none": None, "a copy of the embedding": embedding.clone(), "another": embedding.roll(1, dims=0)}
    file = write_gguf(tmp_path / "tiny.gguf", model, head=heads[head])
    shape, loaded = shape_of(file), load_policy(file, dtype=torch.float32, checkpointing=False)
    assert shape.tied is loaded.config.tie_word_embeddings is (head != "another")
    wanted = {**model.state_dict(), "lm_head.weight": embedding if heads[head] is None else heads[head]}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    tokenizer, own = load_tokenizer(file), make_tokenizer()
    assert tokenizer.encode("Is it so?") == own.encode("Is it so?")
    assert tokenizer.chat_template == CHATML and tokenizer.eos_token_id == own.eos_token_id


def test_a_file_is_converted_once_until_it_changes(tmp_path, model, monkeypatch):
    made = []

    def convert(file, folder):
        made.append(folder)
        folder.mkdir()

    monkeypatch.setattr(gguf_files, "_convert", convert)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"one")
    assert gguf_folder(str(file)) == gguf_folder(str(file)) == made[0]
    file.write_bytes(b"another")
    assert gguf_folder(str(file)) == made[1] != made[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "rwkv7"}, ["architecture rwkv7 is not supported", "folder or the hub id"]),
        ({"parts": 3}, ["one of 3 files", "llama-gguf-split --merge"]),
        ({"cut": 0.5}, ["is not a complete GGUF file"]),
        ({"cut": 0.001}, ["is not a complete GGUF file"]),
    ],
)
def test_a_file_that_cannot_be_converted_is_named_and_leaves_nothing(tmp_path, model, options, words):
    file, cut = tmp_path / "tiny.gguf", options.pop("cut", 1)
    write_gguf(file, model, **options)
    file.write_bytes(file.read_bytes()[: int(cut * file.stat().st_size)])
    with pytest.raises(UsageError) as error:
        shape_of(str(file))
    message = str(error.value)
    assert [word for word in [str(file), *words] if word not in message] == [], message
    assert len(message.splitlines()) <= MAX_LINES
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith("tiny-")]


def test_only_a_file_that_is_there_is_a_gguf_file(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(str(tmp_path / "folder.gguf")) and not is_gguf("nowhere.gguf")
    with pytest.raises(UsageError, match="a GGUF file"):
        shape_of(str(tmp_path / "nowhere.gguf"))
