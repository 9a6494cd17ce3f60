"""An adapter: it changes nothing at first, is all that is trained, has its own reference, and can be read by peft."""

import logging

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM

from grpo_ds.core.packing import pack_groups
from grpo_ds.errors import UsageError
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy, save_merged, save_model, trainable_policy
from grpo_ds.models.reference import kl_floor, make_reference
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.config import TrainConfig
from tests.conftest import tiny_config
from tests.core.test_logprobs import LargestTensor
from tests.core.test_packing import alone, make_groups
from tests.models.test_logprob_model import MODELS, SIZE, LlamaConfig

FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(tiny_config()),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4)),
}
BITS = {16: {}, 8: {"load_in_8bit": True}, 4: {"load_in_4bit": True}}
assert FAMILIES.keys() <= MODELS.keys()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name])
    return made


def policy_on(folder, **flags):
    config = TrainConfig(model=str(folder), logprob_chunk_mib=1.0, **{"lora_r": 4, **flags})
    return trainable_policy(config, dtype=torch.float32, known_ids=259).eval()


def groups():
    return make_groups([11, 5], [[4, 1, 7], [6, 6, 2]])


def rows():
    return pack_groups(*groups(), pad_id=0)


def trained(policy):
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def shake(policy):
    """Change the adapter, as training does."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(folders, family, bits):
    base = load_policy(str(folders[family]), dtype=torch.float32, checkpointing=False, bits=bits).eval()
    policy = policy_on(folders[family], **BITS[bits])
    assert torch.equal(policy(rows()), LogprobModel(base, **policy.options)(rows()))
    policy.train()(rows()).sum().backward()  # with gradient checkpointing
    assert all("lora_" in name for name in trained(policy))
    assert all(p.grad.abs().sum() > 0 for name, p in trained(policy).items() if "lora_B" in name)  # A's is 0 while B is
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


COUNTS = [(family, "all-linear") for family in FAMILIES]
COUNTS += [("qwen2", "up_proj"), ("qwen2", "q_proj,v_proj"), ("llama", "down_proj"), ("gpt2", "c_attn")]
COUNTS += [("gpt2", "c_proj,c_fc")]  # of which attention and MLP have one each


@pytest.mark.parametrize(("family", "target"), COUNTS)
def test_the_plan_counts_the_parameters_that_peft_trains(folders, family, target):
    policy = policy_on(folders[family], lora_target=target)
    counted = shape_of(str(folders[family])).lora_parameters(4, target.split(","))
    assert counted == sum(p.numel() for p in trained(policy).values())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "c_attn", "q_proj,nothing"])
def test_layers_that_cannot_have_an_adapter_are_named(folders, target):
    with pytest.raises(UsageError, match=rf"{target.split(',')[-1]}, which no block.*\n.*q_proj.*all-linear"):
        shape_of(str(folders["qwen2"])).lora_parameters(4, target.split(","))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_the_bytes_of_the_frozen_base(folders, family, bits):
    model = load_policy(str(folders[family]), dtype=torch.float32, checkpointing=False, bits=bits)
    LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1)(rows())  # LLM.int8 settles at its first product
    size = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):  # NF4's codes and scales, beside tables of fixed size
            size += state.absmax.nbytes + state.state2.absmax.nbytes
    size += sum(module.state.SCB.nbytes for module in model.modules() if isinstance(module, Linear8bitLt))
    # A layer's last block of scales is not full: 3 bytes of each of these tiny layers.
    assert shape_of(str(folders[family])).base_bytes(bits, 4) == pytest.approx(size, rel=1e-3 if bits == 4 else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_one_completion_alone(folders, family):
    policy = policy_on(folders[family])
    shake(policy)
    prompts, ids, mask = groups()
    torch.testing.assert_close(policy(rows()), alone(policy.model, prompts, ids, mask, 259), atol=1e-5, rtol=1e-5)


def test_the_seed_decides_the_adapter_and_disturbs_nothing_else(folders):
    state = torch.get_rng_state()
    one, same, other = (policy_on(folders["qwen2"], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in trained(one).items():
        assert torch.equal(weight, trained(same)[name])
        assert "lora_B" in name or not torch.equal(weight, trained(other)[name])


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_the_base_and_later_the_adapter_of_that_moment(folders, bits):
    policy, batch = policy_on(folders["qwen2"], **BITS[bits]), rows()
    base = policy(batch).detach()
    first = make_reference(policy, "adapter", store=None)
    assert kl_floor(policy, first, batch) == 0
    memory = [p.data_ptr() for p in policy.parameters()]
    shake(policy)
    moved = policy(batch).detach()
    second = make_reference(policy, "adapter", store=None)
    shake(policy)
    assert torch.equal(first(batch), base) and torch.equal(second(batch), moved)
    assert not torch.equal(policy(batch), moved)
    assert [p.data_ptr() for p in policy.parameters()] == memory  # ZeRO's views are where they were
    assert first.bytes() == 4 * sum(p.numel() for p in trained(policy).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_loads_in_peft_and_merges_into_the_same_function(folders, family, tmp_path):
    policy, batch = policy_on(folders[family]), rows()
    shake(policy)
    save_model(policy.model, tmp_path / "run")
    save_merged(tmp_path / "run", tmp_path / "merged", dtype=torch.float32)
    loaded = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[family]), tmp_path / "run"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run"),
    ]
    models = [model.get_base_model() for model in loaded]
    models.append(load_policy(str(tmp_path / "run"), dtype=torch.float32, checkpointing=False))
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for model in models:
        found = LogprobModel(model.eval(), **policy.options)(batch)
        torch.testing.assert_close(found, policy(batch), atol=1e-5, rtol=1e-5)
    assert shape_of(str(tmp_path / "run")).parameters == shape_of(str(folders[family])).parameters


FOREIGN = {
    "peft's LoRA": lambda: LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
    "DoRA": lambda: LoraConfig(r=4, task_type="CAUSAL_LM", use_dora=True),
    "LoRA with biases": lambda: LoraConfig(r=4, task_type="CAUSAL_LM", bias="all"),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", ["ours", *FOREIGN])
def test_an_adapter_that_is_merged_for_training_trains_all_parameters_from_its_own_function(folders, kind, tmp_path):
    """`--model ADAPTER --lora_r 0`, as docs/lora.md and the refusal of a second adapter advise."""
    if kind == "ours":
        made = policy_on(folders["qwen2"])
        shake(made)
        save_model(made.model, tmp_path)
    else:
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["qwen2"]), FOREIGN[kind]())
        made = LogprobModel(adapted.get_base_model(), vocab_size=259, temperature=1.0, chunk_mib=1)
        shake(made)
        adapted.save_pretrained(tmp_path)
    policy = policy_on(tmp_path, lora_r=0)
    assert trained(policy).keys() == {name for name, _ in policy.named_parameters()} and len(trained(policy)) == 26
    torch.testing.assert_close(policy(rows()), made.eval()(rows()), atol=1e-4, rtol=1e-4)
    policy.train()(rows()).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_the_head_of_a_frozen_base_gets_no_gradient_and_no_large_tensor(folders):
    policy = policy_on(folders["qwen2"])
    with LargestTensor() as watch:
        policy(rows()).sum().backward()
    assert watch.elements < 272 * 64  # the head's gradient would be as large as the head


def test_a_base_in_four_bits_gives_the_same_gradients_after_an_evaluation_pass(folders):
    """On CPUs with AVX-512 bf16 bitsandbytes packs the weights in that pass, and then no gradient goes through them."""
    policy, batch = policy_on(folders["qwen2"], **BITS[4]), rows()

    def gradients():
        policy.zero_grad()
        policy.train()(batch).sum().backward()
        return [parameter.grad.clone() for parameter in trained(policy).values()]

    before = gradients()
    with torch.no_grad():
        policy.eval()(batch)
    assert all(torch.equal(one, two) for one, two in zip(before, gradients(), strict=True))
    assert any(gradient.abs().max() > 0 for gradient in before)
    linears = [module for module in policy.modules() if isinstance(module, Linear4bit)]
    assert linears and not any(module.support_avx512bf16_for_cpu for module in linears)


def test_of_bitsandbytes_only_the_line_about_a_package_that_we_do_not_use_is_hidden():
    said = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you ..."
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    for text, shown in ((said, False), ("Another line: %s", True)):
        record = logging.LogRecord(
            logger.name, logging.WARNING, __file__, 1, text, ("No module named 'kernels'",), None
        )
        assert bool(logger.filter(record)) == shown
