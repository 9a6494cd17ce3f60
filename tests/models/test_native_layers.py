"""A token in one call on a CPU: logits nearer to the exact ones than those of the model's own layers in bf16."""

import pytest
import torch

from grpo_ds.models import native_layers
from grpo_ds.models.lora import add_adapter
from grpo_ds.models.native_layers import NativeWeights, can_decode_natively
from grpo_ds.models.shared_prompt import SharedPrompts
from grpo_ds.training.sampling import Sampler
from tests.models.test_fused_layers import KINDS, OTHERS, PROMPTS, SIZE, error, model_of

TOKENS = torch.randint(0, 200, (12, 9), generator=torch.Generator().manual_seed(1))
ODD = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "vocab_size": 277,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def capable():
    """Needs a C++ compiler and a processor with AVX-512 bf16."""
    if not can_decode_natively(model_of("llama", torch.bfloat16)):
        pytest.skip("no compiler, or no bf16 on this processor")


def decoder(model, **options):
    return SharedPrompts(model, PROMPTS, group_size=3, columns=12, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_native_layers_are_nearer_to_the_exact_logits_than_the_models_own(kind):
    """Prompts of three lengths, and rows leave in the middle. The oracle is a pass over each row in fp32."""
    model = model_of(kind, torch.bfloat16)
    exact = model_of(kind, torch.bfloat16).float()
    native = error(decoder(model, native=NativeWeights(model)), exact, TOKENS)
    assert native < error(decoder(model), exact, TOKENS)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
def test_logits_do_not_depend_on_how_many_rows_are_computed_together(rows):
    model = model_of("qwen2", torch.bfloat16)
    weights, prompt = NativeWeights(model), [5, 6, 7, 9]
    tokens, positions = torch.arange(rows), torch.full((rows,), len(prompt) - 1)
    together = SharedPrompts(model, [prompt], group_size=rows, columns=2, native=weights)(tokens, positions)
    for row, token in enumerate(tokens):
        alone = SharedPrompts(model, [prompt], group_size=1, columns=2, native=weights)(token[None], positions[:1])
        assert torch.equal(together[row], alone[0])


def test_sizes_that_fill_no_tile(monkeypatch):
    """Products of 48 and 277 outputs, where a tile has 32; one head of 16 columns for three of queries."""
    for name, size in ODD.items():
        monkeypatch.setitem(SIZE, name, size)
    model, exact = model_of("qwen2", torch.bfloat16), model_of("qwen2", torch.bfloat16).float()
    assert can_decode_natively(model)
    native = error(decoder(model, native=NativeWeights(model)), exact, TOKENS)
    assert native < error(decoder(model), exact, TOKENS)


def test_other_models_keep_their_own_layers():
    assert not can_decode_natively(model_of("qwen2"))  # fp32
    for kind in OTHERS:
        assert not can_decode_natively(model_of(kind, torch.bfloat16))
    adapted = model_of("qwen2", torch.bfloat16)
    add_adapter(adapted, r=4, alpha=8, targets=["q_proj"], base="somewhere", seed=0)
    assert not can_decode_natively(adapted)


def test_without_a_compiler_torchs_layers_sample(monkeypatch, tiny_model, tokenizer, caplog):
    monkeypatch.setattr(native_layers, "library", native_layers.library.__wrapped__)
    monkeypatch.setattr(native_layers, "build", _no_compiler)
    sampler = Sampler(tiny_model.bfloat16(), tokenizer, max_completion_length=4)
    assert len(sampler([[1, 2, 3]], group_size=2, temperature=1.0).ids) == 2
    assert not sampler.one_call and "torch's slower layers: no C++ compiler" in caplog.text


def _no_compiler(*_):
    raise FileNotFoundError("no C++ compiler")


def test_a_bf16_rollout_takes_the_native_layers_and_sees_new_weights(tiny_model, tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr("grpo_ds.training.sampling.NativeWeights", lambda model: made.append(1) or NativeWeights(model))
    sampler = Sampler(tiny_model.bfloat16(), tokenizer, max_completion_length=9)
    first = sampler([[1, 2, 3]], group_size=4, temperature=1.0)
    assert sampler.native is None and made  # the copies are freed
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight.normal_()
    assert not torch.equal(first.ids, sampler([[1, 2, 3]], group_size=4, temperature=1.0).ids)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_number(threads):
    model = model_of("qwen3", torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = [logits.clone() for logits in _logits(model)]
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    expected = [logits.clone() for logits in _logits(model)]
    torch.set_num_threads(before)
    assert all(map(torch.equal, logits, expected))


def _logits(model):
    decode = decoder(model, native=NativeWeights(model))
    for t in range(3):
        yield decode(torch.arange(9), torch.tensor([len(prompt) - 1 + t for prompt in PROMPTS for _ in range(3)]))
