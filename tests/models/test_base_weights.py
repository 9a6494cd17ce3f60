"""The hash of an adapter's base: the same for the same model anywhere, another for any other model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_ds.models.base_weights import base_hash


def one_weight(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[5] += 1e-3
    model.save_pretrained(folder)


def in_parts(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()


def setting(file: str, **changes):
    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, **changes}))

    return change


CHANGES = {
    "in another place": (lambda folder: None, True),
    "in several files": (in_parts, True),
    "written by another version": (setting("config.json", transformers_version="9"), True),
    "another tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), True),  # the checkpoint has its own
    "one weight": (one_weight, False),
    "another config": (setting("config.json", rope_theta=5e5), False),
    "another end": (setting("generation_config.json", eos_token_id=3), False),
    "code of its own": (lambda folder: (folder / "modeling.py").write_text("x = 1"), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_hash_is_of_what_the_base_computes(tiny_folder, tmp_path, name):
    change, same = CHANGES[name]
    there = shutil.copytree(tiny_folder, tmp_path / "there")
    change(there)
    assert (base_hash(str(there)) == base_hash(str(tiny_folder))) is same


@pytest.mark.parametrize("text", ["", "no safetensors", '{"a": 1}'])
def test_what_cannot_be_read_has_no_hash(tiny_folder, tmp_path, text):
    there = shutil.copytree(tiny_folder, tmp_path / "there")
    (there / "model.safetensors").write_text(text)
    assert base_hash(str(there)) is None
    assert base_hash(str(tmp_path / "nowhere")) is None
