"""The reference: the memory and the KL of 8 bits, and that it does not change with the policy."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from grpo_ds.core.packing import pack_groups
from grpo_ds.errors import UsageError
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.quantized import dequantize, quantize
from grpo_ds.models.reference import Reference, kl_floor
from tests.conftest import tiny_config


def rows(vocab=250):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 3, 5, 1])[:, None]
    prompts = [torch.randint(0, vocab, (n,), generator=g) for n in (7, 12)]
    return pack_groups(prompts, torch.randint(0, vocab, (4, 9), generator=g), mask, pad_id=0)


def as_policy(model):
    return LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1).eval()


def untied():
    torch.manual_seed(1)
    return Qwen2ForCausalLM(tiny_config(tie_word_embeddings=False)).eval()


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("width", [64, 576, 100, 33])
def test_quantizing_errs_by_half_a_step_at_most(width):
    weight = torch.randn(50, width) * torch.logspace(-6, 2, 50)[:, None]
    codes, scale = quantize(weight)
    step = scale.repeat_interleave(width // scale.shape[1], dim=1)
    assert ((dequantize(codes, scale) - weight).abs() <= 0.5001 * step).all()


def test_zeros_stay_zeros():
    codes, scale = quantize(torch.zeros(4, 64))
    assert dequantize(codes, scale).abs().max() == 0


@pytest.mark.parametrize("make", [untied, gpt2])
def test_every_kind_of_model_is_copied_whole(make):
    policy = as_policy(make())
    batch = rows()
    torch.testing.assert_close(Reference(policy, "bf16")(batch), policy(batch).detach())


@pytest.mark.parametrize("kind", ["int8", "llm.int8", "bf16", "bf16-cpu"])
def test_a_fresh_reference_is_close_to_the_policy_and_frozen(tiny_model, kind):
    policy, batch = as_policy(tiny_model), rows()
    reference = Reference(policy, kind)
    floor = kl_floor(policy, reference, batch)
    assert floor < 1e-3 if "int8" in kind else floor == 0
    before = reference(batch)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(0.1)
    assert torch.equal(reference(batch), before)
    assert not any(p.requires_grad for p in reference.model.parameters())


@pytest.mark.parametrize("kind", ["bf16", "bf16-cpu"])
def test_mixing_moves_every_weight_by_alpha(tiny_model, kind):
    policy = as_policy(tiny_model)
    reference = Reference(policy, kind)
    before = {name: p.clone() for name, p in reference.model.named_parameters()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    reference.mix(policy, 0.25)
    assert before.keys() == dict(policy.named_parameters()).keys()
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25)
    reference.mix(policy, 1.0)
    torch.testing.assert_close(reference(rows()), policy(rows()).detach())


def test_int8_costs_about_a_byte_a_weight_with_a_tied_head_kept_once():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config()).to(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters())
    size = Reference(as_policy(model), "int8").bytes()
    assert weights < size < 1.06 * weights  # a scale in bf16 for 64 weights is 3 %, norms and biases the rest


def test_models_that_change_their_logits_are_refused(tiny_model):
    tiny_model.config.final_logit_softcapping = 30.0
    with pytest.raises(UsageError, match="final_logit_softcapping"):
        as_policy(tiny_model)
