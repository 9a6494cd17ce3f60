"""A reference that stays on disk: the numbers of its files whatever the policy has become, and nothing kept."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from grpo_ds.errors import MAX_LINES, CheckpointError
from grpo_ds.models import policy as policies
from grpo_ds.models.policy import save_model
from grpo_ds.models.reference import StreamedReference, kl_floor, restore_reference
from grpo_ds.models.stored_weights import StoredWeights, own_weights, store_weights
from grpo_ds.system import ranks
from tests.conftest import tiny_config
from tests.models.test_reference import as_policy, rows


def qwen(**changes):
    torch.manual_seed(2)
    return Qwen2ForCausalLM(tiny_config(**changes)).eval()


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4)).eval()


MODELS = {
    "tied": qwen,
    "untied": lambda: qwen(tie_word_embeddings=False),
    "bf16, a padding id in the embedding": lambda: qwen(pad_token_id=200).bfloat16(),
    "gpt2, with learned positions": gpt2,
}


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)


@pytest.fixture(params=MODELS)
def streamed(request, tmp_path):
    """A policy, and the reference of its files."""
    policy = as_policy(MODELS[request.param]())
    save_model(policy.model, tmp_path / "model")
    return policy, StreamedReference(policy, StoredWeights(tmp_path / "model"))


def test_it_scores_as_the_stored_model_does_whatever_the_policy_is(streamed):
    policy, reference = streamed
    batch = rows()
    at_start = policy(batch).detach()
    assert torch.equal(reference(batch), at_start) and kl_floor(policy, reference, batch) == 0
    changed(policy.model)
    now = policy(batch).detach()
    assert not torch.allclose(now, at_start, atol=0.1)
    assert torch.equal(reference(batch), at_start)
    assert torch.equal(policy(batch).detach(), now)  # the policy's own weights are back


def test_the_policy_keeps_its_memory_its_mode_and_its_hooks(streamed):
    policy, reference = streamed
    policy.train()
    places = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    padding = policy.model.get_input_embeddings().padding_idx
    reference(rows())
    assert {name: parameter.data_ptr() for name, parameter in policy.named_parameters()} == places
    assert policy.training and policy.model.get_input_embeddings().padding_idx == padding
    assert not any(it._forward_hooks or it._forward_pre_hooks for it in policy.model.modules())


def test_a_pass_that_fails_gives_the_policy_back(streamed, monkeypatch):
    policy, reference = streamed
    batch, places = rows(), {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    last = [*reference.model.layers][-1]
    monkeypatch.setattr(last, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        reference(batch)
    assert {name: parameter.data_ptr() for name, parameter in policy.named_parameters()} == places
    assert not any(it._forward_hooks or it._forward_pre_hooks for it in policy.model.modules())


def test_only_the_tokens_rows_of_the_embedding_are_taken(streamed):
    policy, reference = streamed
    batch, seen = rows(), []
    embedding = policy.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, *_: seen.append(module.weight.shape[0]))
    reference(batch)
    assert seen == [len(batch.input_ids.unique())] and reference.bytes() == 0


# --- which files ------------------------------------------------------------------------------------------------


def test_a_models_own_files_are_used_while_the_policy_is_what_they_hold_else_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "SHARD_BYTES", 100_000)  # several files
    model, alone = qwen(), ranks.start()
    save_model(model, tmp_path / "model")
    policy = as_policy(model)
    assert len({*StoredWeights(tmp_path / "model").places.values()}) > 1
    own = store_weights(policy, str(tmp_path / "model"), tmp_path / "copy", alone)
    assert own.folder == tmp_path / "model" and not (tmp_path / "copy").exists()
    changed(model)
    copy = store_weights(policy, str(tmp_path / "model"), tmp_path / "copy", alone)
    assert copy.folder == tmp_path / "copy" and copy.equal(model) and not own.equal(model)
    temporary = store_weights(policy, str(tmp_path / "model"), None, alone)
    folder = temporary.folder
    assert temporary.equal(model) and folder.is_dir()
    del temporary
    assert not folder.exists()


def test_weights_of_another_kind_of_file_are_copied(tmp_path):
    model = qwen()
    save_model(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    assert own_weights(str(tmp_path / "model"), model) is None
    assert own_weights("no/such-model", model) is None


def test_a_checkpoint_finds_the_same_files_where_they_were_or_beside_it(tmp_path):
    model = qwen()
    policy = as_policy(model)
    save_model(model, tmp_path / "run" / "reference-4")
    state = StreamedReference(policy, StoredWeights(tmp_path / "run" / "reference-4")).state()
    before = policy(rows()).detach()
    changed(model)
    found = restore_reference(policy, "streamed", state, run=tmp_path / "elsewhere")
    assert torch.equal(found(rows()), before)
    (tmp_path / "run").rename(tmp_path / "moved")
    found = restore_reference(policy, "streamed", state, run=tmp_path / "moved")
    assert found.stored.folder == tmp_path / "moved" / "reference-4" and torch.equal(found(rows()), before)


def spoil(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("fault", "said"),
    [(spoil, "other weights now"), (cut, "damaged"), (lambda folder: folder.rename(folder.parent / "x"), "gone")],
    ids=["other", "cut", "gone"],
)
def test_other_files_are_refused_by_name(tmp_path, fault, said):
    policy = as_policy(qwen())
    save_model(policy.model, tmp_path / "model")
    state = StreamedReference(policy, StoredWeights(tmp_path / "model")).state()
    assert json.loads(json.dumps(state)) == state
    fault(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"streamed from {tmp_path}/model, which is {said}") as caught:
        restore_reference(policy, "streamed", state, run=tmp_path / "run")
    assert len(str(caught.value).splitlines()) <= MAX_LINES
