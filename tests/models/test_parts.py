"""Parts of a model's folder that do not belong together are named by every command, before weights are read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from grpo_ds.commands import ask, evaluate, profile, select, train
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.models.parts import check_parts
from grpo_ds.models.policy import check_folder, load_policy, load_tokenizer
from grpo_ds.task.chat import DEFAULT_CHAT_TEMPLATE
from tests.conftest import CHATML, make_tokenizer, tiny_config

ONE_LAYER, THREE_LAYERS = (["full_attention"] * layers for layers in (1, 3))
MORE, FOREIGN = [f"<{n}>" for n in range(20)], CHATML.replace("im_end", "eot_id")
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


def json_change(name, **changes):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def config(**changes):
    return json_change("config.json", **changes)


def generation(**changes):
    return json_change("generation_config.json", **changes)


def weights(change):
    def changed(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def added(name):
    return weights(lambda tensors: tensors.update({name: torch.ones(64)}))


def tokenizer(change):
    def changed(folder):
        made = make_tokenizer()
        change(made)
        made.save_pretrained(folder)

    return changed


def template(text):
    return tokenizer(lambda made: setattr(made, "chat_template", text))


DAMAGE = {  # what is wrong: the damage, and words of the message
    "a vocabulary above the weights'": (config(vocab_size=300), ["config.json and model.safetensors", "[272, 64]"]),
    "a hidden size below the weights'": (config(hidden_size=32), ["embed_tokens.weight", "25 more"]),
    "a hidden size that no head divides": (config(hidden_size=66), ["embed_tokens.weight", "[272, 66]"]),
    "more heads of keys": (config(num_key_value_heads=4), ["k_proj"]),
    "a layer too many": (config(num_hidden_layers=3, layer_types=THREE_LAYERS), ["lacks model.layers.2", "random"]),
    "a layer too few": (config(num_hidden_layers=1, layer_types=ONE_LAYER), ["no place for model.layers.1", "11 more"]),
    "layers that config.json itself counts twice": (config(num_hidden_layers=3), ["num_hidden_layers"]),
    "a head that is missing": (config(tie_word_embeddings=False), ["lacks lm_head.weight"]),
    "another architecture": (config(model_type="llama"), ["no place for", "k_proj.bias"]),
    "a missing tensor": (weights(lambda t: t.pop("model.norm.weight")), ["lacks model.norm.weight"]),
    "a surplus layer": (added("model.layers.2.mlp.up_proj.weight"), ["no place for model.layers.2"]),
    "a surplus bias": (added("model.layers.1.mlp.up_proj.bias"), ["no place for", "up_proj.bias"]),
    "a tokenizer above the embedding": (tokenizer(lambda t: t.add_tokens(MORE)), ["up to 278", "272 rows", "(279)"]),
    "an embedding below the tokenizer": (config(vocab_size=200), ["ids up to 258", "200 rows"]),
    "an EOS above the vocabulary": (generation(eos_token_id=900), ["eos_token_id 900", "259"]),
    "an EOS among the padding rows": (generation(eos_token_id=[256, 265]), ["eos_token_id 265"]),
    "a negative EOS": (generation(eos_token_id=-1), ["eos_token_id -1"]),
    "a padding id above the vocabulary": (config(pad_token_id=300), ["pad_token_id 300"]),
    "a template for another tokenizer": (template(FOREIGN), ["<|eot_id|>", "chat_template.jinja"]),
}  # fmt: skip


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    def make(damage, name="damaged"):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        damage(folder)
        return folder

    return make


def refused(call, *words):
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) <= MAX_LINES and [word for word in words if word not in message] == [], message
    return message


def load(folder):
    load_tokenizer(str(folder))
    return load_policy(str(folder), dtype=torch.float32, checkpointing=False)


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_parts_that_disagree_are_named_before_weights_are_read(damaged, monkeypatch, damage, words):
    folder = damaged(damage)
    refused(lambda: check_folder(str(folder)), "damaged", *words)
    never(monkeypatch)
    refused(lambda: load(folder), "damaged", *words)


def never(monkeypatch):
    """Let nothing read weights: loading with a path fails the test."""
    whole = PreTrainedModel.from_pretrained.__func__

    def headers_only(cls, path, *words, **options):
        assert path is None, "weights were read"
        return whole(cls, path, *words, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(headers_only))


COMMANDS = {
    "train": (train.main, ["--num_steps", "1", "--output_dir", "{out}"]),
    "train --plan": (train.main, ["--plan"]),
    "profile": (profile.main, ["--output_dir", "{out}"]),
    "evaluate": (evaluate.main, ["--eval_limit", "1"]),
    "ask": (ask.main, ["--question", "Does it?", "--context", "It does."]),
    "select": (select.main, ["--gpu_gib", "0"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", ["a vocabulary above the weights'", "a tokenizer above the embedding"])
def test_every_command_names_it_and_writes_nothing(damaged, tmp_path, monkeypatch, command, damage):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    main, flags = COMMANDS[command]
    wrong, words = DAMAGE[damage]
    folder = damaged(wrong)
    never(monkeypatch)
    data = [] if command == "ask" else ["--data", "sample"]
    flags = [flag.format(out=tmp_path / "run") for flag in flags]
    refused(lambda: main(["--model", str(folder), *data, *flags]), *words)
    assert not (tmp_path / "run").exists()


SOUND = {
    "nothing changed": lambda folder: None,
    "a tied head that is stored as well": weights(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    ),
    "a value head beside the model": added("v_head.summary.weight"),
    "the names of the base model": weights(
        lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)]
    ),
    "a marker that the tokenizer reads as text": template(CHATML.replace("<|im_start|>", "<|user|>")),
    "no chat template": template(None),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND.keys())
def test_a_folder_whose_parts_belong_together_loads(damaged, change):
    folder = damaged(change)
    check_folder(str(folder))
    assert load(folder).num_parameters() == Qwen2ForCausalLM(tiny_config()).num_parameters()


def test_another_head_than_the_promised_one_is_refused_and_kept_when_the_config_says_so(damaged):
    head = torch.ones(272, 64)
    folder = damaged(weights(lambda t: t.update({"lm_head.weight": head})))
    refused(lambda: load(folder), "tie_word_embeddings", "model.safetensors")
    config(tie_word_embeddings=False)(folder)  # as the message says
    assert torch.equal(load(folder).lm_head.weight, head)


def test_weights_in_an_old_file_are_compared_after_loading(damaged):
    folder = damaged(config(tie_word_embeddings=False))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(lambda: load(folder), "lacks lm_head.weight", "random")


def test_a_file_in_parts_is_compared_by_its_index(tiny_folder, tmp_path):
    Qwen2ForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path, max_shard_size="50KB")
    made = AutoConfig.from_pretrained(tmp_path)
    check_parts(tmp_path, made)
    made.vocab_size = 300
    refused(lambda: check_parts(tmp_path, made), "model.safetensors.index.json", "[300, 64]")
    next(tmp_path.glob("model-*.safetensors")).unlink()
    refused(lambda: check_folder(str(tmp_path)), "cannot be loaded", "model-0")


# --- the remedies that these messages name ----------------------------------------------------------


def test_rows_can_be_added_as_the_message_says(damaged):
    folder = damaged(DAMAGE["a tokenizer above the embedding"][0])
    (rows,) = re.findall(r"resize_token_embeddings\((\d+)\)", refused(lambda: load(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(int(rows))
    model.save_pretrained(folder)
    load(folder)


@pytest.mark.parametrize("damage", ["an EOS above the vocabulary", "an EOS among the padding rows", "a negative EOS"])
def test_an_eos_can_be_set_as_the_message_says(damaged, damage):
    folder = damaged(DAMAGE[damage][0])
    (eos,) = re.findall(r"eos_token_id (\d+), pad", refused(lambda: load(folder)))
    generation(eos_token_id=int(eos))(folder)
    load(folder)


def test_a_foreign_template_can_be_removed_as_the_message_says(damaged):
    folder = damaged(DAMAGE["a template for another tokenizer"][0])
    refused(lambda: load(folder), "chat_template.jinja")
    (folder / "chat_template.jinja").unlink()
    load(folder)
    assert load_tokenizer(str(folder)).chat_template == DEFAULT_CHAT_TEMPLATE


# --- adapters ---------------------------------------------------------------------------------------


def adapter(folder, base, made, **base_changes):
    """Write a foreign adapter for `base`, then let it name a base with other sizes."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), made).save_pretrained(folder / "adapter")
    if base_changes:
        Qwen2ForCausalLM(tiny_config(**base_changes)).save_pretrained(folder / "other")
        json_change("adapter_config.json", base_model_name_or_path=str(folder / "other"))(folder / "adapter")
        make_tokenizer().save_pretrained(folder / "other")
    return folder / "adapter"


def lora(**options):
    return LoraConfig(r=4, task_type="CAUSAL_LM", **options)


MISFITS = {
    "another hidden size": (lora(), {"hidden_size": 32}, ["[4, 64]", "[4, 32]", "base_model_name_or_path"]),
    "another vocabulary": (lora(modules_to_save=["lm_head"]), {"vocab_size": 300}, ["[272, 64]", "[300, 64]"]),
    "fewer layers": (lora(), {"num_hidden_layers": 1}, ["layers.1", "lacks"]),
    "more layers": (lora(target_modules=["q_proj"]), {"num_hidden_layers": 3}, ["layers.2", "missing"]),
    "tokens in place of weights": (PromptTuningConfig(**TOKENS), {}, ["PROMPT_TUNING", "cannot be merged"]),
    "keys in place of weights": (PrefixTuningConfig(**TOKENS), {}, ["PREFIX_TUNING", "LoRA"]),
}  # fmt: skip


@pytest.mark.parametrize(("made", "changes", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_an_adapter_that_does_not_fit_its_base_is_named(tiny_folder, tmp_path, monkeypatch, made, changes, words):
    folder = adapter(tmp_path, tiny_folder, made, **changes)
    never(monkeypatch)
    for check in (check_folder, load):
        refused(lambda check=check: check(str(folder)), "adapter", *words)


def test_an_adapter_without_weights_is_named_and_a_sound_one_is_checked_without_a_word(tiny_folder, tmp_path, recwarn):
    folder = adapter(tmp_path, tiny_folder, lora())
    recwarn.clear()
    check_folder(str(folder))
    assert [str(one.message) for one in recwarn if one.category is FutureWarning] == []
    (folder / "adapter_model.safetensors").unlink()
    refused(lambda: check_folder(str(folder)), str(folder), "adapter_model.safetensors is missing", str(tiny_folder))


def test_an_adapter_on_another_architecture_is_named(tiny_folder, tmp_path):
    folder = adapter(tmp_path, tiny_folder, lora(target_modules=["q_proj"]))
    GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4)).save_pretrained(tmp_path / "gpt2")
    GenerationConfig(eos_token_id=256).save_pretrained(tmp_path / "gpt2")
    config(bos_token_id=256, eos_token_id=256)(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    json_change("adapter_config.json", base_model_name_or_path=str(tmp_path / "gpt2"))(folder)
    refused(lambda: load(folder), "does not fit its base", "gpt2", "q_proj", "adapter_config.json")
    json_change("adapter_config.json", base_model_name_or_path=str(tiny_folder))(folder)  # as the message says
    load(folder)
