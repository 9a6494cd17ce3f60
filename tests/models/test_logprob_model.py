"""A causal LM as packed rows -> log-probs: every architecture, with checkpointing, without large tensors."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_ds.core.packing import pack_groups
from grpo_ds.models.logprob_model import LogprobModel, why_not_packed
from tests.conftest import tiny_config
from tests.core.test_logprobs import LargestTensor
from tests.core.test_packing import alone, make_groups

SIZE = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(tiny_config()),
    "qwen2 with a head of its own": lambda: Qwen2ForCausalLM(tiny_config(tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4)),
}


OTHERS = {  # kind -> its config, and the reason why it cannot use packed rows
    "opt": ({**SIZE, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128}, None),
    "mistral": ({**SIZE, "num_key_value_heads": 2, "sliding_window": 4096}, None),  # wider than any row of 30 tokens
    "gemma3_text": ({**SIZE, "head_dim": 16, "sliding_window": 8}, "attention window of 8 tokens"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "window_size": 8}, "more than plain SDPA"),
    "mpt": ({"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, "more than plain SDPA"),  # ALiBi
    "bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4}, "unpack"),  # takes masks [Q, P] alone
    "mamba": ({"hidden_size": 64, "num_hidden_layers": 2}, "not enough values"),  # no attention at all
}
OTHERS["gpt_neo"][0].update(hidden_size=64, num_layers=2, num_heads=4)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_cannot_pack_is_found_out_and_gets_padded_rows(kind):
    config, reason = OTHERS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**config, "vocab_size": 272})).eval()
    policy = LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1)
    found = why_not_packed(policy, longest=30)
    assert (found is None) if reason is None else (reason in str(found))
    policy.packs = found is None
    prompts, ids, mask = make_groups([11, 5], [[4, 1, 7], [6, 6, 2]])
    rows = pack_groups([prompt for prompt in prompts for _ in range(1 if policy.packs else 3)], ids, mask, pad_id=0)
    torch.testing.assert_close(policy(rows), alone(model, prompts, ids, mask, 259), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_families_we_name_pack(name):
    policy = LogprobModel(MODELS[name]().eval(), vocab_size=259, temperature=1.0, chunk_mib=1)
    assert why_not_packed(policy, longest=100_000) is None


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_alone_for_every_architecture(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    prompts, ids, mask = make_groups([11, 5], [[4, 1, 7], [6, 6, 2]])
    packed = LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1)(
        pack_groups(prompts, ids, mask, pad_id=0)
    )
    torch.testing.assert_close(packed, alone(model, prompts, ids, mask, 259), atol=1e-5, rtol=1e-5)


def test_checkpointing_recomputes_and_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(tiny_config()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rows = pack_groups(*make_groups([11, 5], [[4, 1, 7], [6, 6, 2]]), pad_id=0)
        LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1)(rows).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_forward_and_backward_hold_no_tensor_of_tokens_by_vocabulary():
    vocab, tokens = 30_000, 2 * 4 * 32
    model = Qwen2ForCausalLM(tiny_config(vocab_size=vocab, hidden_size=32, num_attention_heads=2))
    rows = pack_groups(*make_groups([10, 10], [[32] * 4] * 2), pad_id=0)
    with LargestTensor() as watch:
        LogprobModel(model, vocab_size=vocab, temperature=1.0, chunk_mib=0.5)(rows).sum().backward()
    assert watch.elements == vocab * 32  # the head and its gradient; logits would be 8 times that
    assert watch.elements < tokens * vocab


def test_the_same_rows_give_the_same_gradients_bit_by_bit():
    """Holds even where one position has many gradients: a prompt's last token predicts 150 first tokens."""
    torch.manual_seed(0)
    policy = LogprobModel(Qwen2ForCausalLM(tiny_config()).train(), vocab_size=259, temperature=1.0, chunk_mib=1)
    rows = pack_groups(*make_groups([11], [[6] * 150]), pad_id=0)
    seen = []
    for _ in range(40):
        policy.zero_grad()
        policy(rows).sum().backward()
        seen.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)


def test_training_leaves_the_policys_entropies_behind():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config()).train()
    policy = LogprobModel(model, vocab_size=259, temperature=2.0, chunk_mib=1)
    (prompt,), ids, mask = make_groups([11], [[4, 1, 7]])
    rows = pack_groups([prompt], ids, mask, pad_id=0)
    policy(rows)
    kept = policy.entropies
    for b, length in enumerate((4, 1, 7)):
        logits = model(torch.cat([prompt, ids[b, :length]])[None]).logits[0, len(prompt) - 1 : -1, :259]
        expected = torch.distributions.Categorical(logits=logits / 2.0).entropy()
        torch.testing.assert_close(kept[b, :length], expected, atol=1e-5, rtol=1e-5)
    assert not kept.requires_grad and not kept[~mask].any()
    policy.eval()(rows)
    assert policy.entropies is kept  # a reference never pays for them
    policy.train()(rows, entropy_gradient=True)
    assert policy.entropies.requires_grad
