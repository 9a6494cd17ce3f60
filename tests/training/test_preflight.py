"""Preflight passes if nothing is wrong, changes nothing, and names each fault that is planted."""

import pytest
import torch

from grpo_ds.core.objective import Objective
from grpo_ds.errors import MAX_LINES, PreflightError
from grpo_ds.models import attention
from grpo_ds.system import ranks
from grpo_ds.training import preflight as module
from grpo_ds.training.preflight import generation_config_problems, preflight
from grpo_ds.training.sampling import Completions, Sampler
from tests.conftest import make_tokenizer
from tests.training.layouts import LAYOUTS, assert_untouched, everything, make_engine, rollout_of, take_step

OBJECTIVE = Objective(beta=0.1, max_completion_length=5)


def check(engine, *, pack_tokens=0, tokenizer=None, objective=OBJECTIVE):
    sampler = Sampler(engine.model, tokenizer or make_tokenizer(), max_completion_length=5)
    preflight(engine, sampler, ranks.start(), objective=objective, pack_tokens=pack_tokens)


@pytest.fixture
def engine(tiny_folder, tmp_path):
    made = make_engine(tiny_folder, tmp_path, "offload")
    yield made
    made.close()


def refused(engine, words, **options):
    """Return the error after checking that it says these words in six lines and that nothing has changed."""
    before = everything(engine)
    with pytest.raises(PreflightError, match=words) as error:
        check(engine, **options)
    assert error.value.exit_code == 6 and len(str(error.value).splitlines()) <= MAX_LINES
    assert_untouched(before, engine)
    return error.value


@pytest.mark.parametrize("pack_tokens", [0, 35])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_preflight_leaves_no_trace(tiny_folder, tmp_path, layout, pack_tokens):
    """Neither now nor in later steps, bit for bit."""
    checked, plain = (make_engine(tiny_folder, tmp_path, layout) for _ in range(2))
    before, torch_state = everything(checked), torch.get_rng_state()
    check(checked, pack_tokens=pack_tokens)
    assert_untouched(before, checked)
    assert torch.equal(torch.get_rng_state(), torch_state)
    for _ in range(2):
        one, two = (take_step(engine, rollout_of(), pack_tokens=pack_tokens) for engine in (checked, plain))
        assert one.tally.means() == two.tally.means()
    assert_untouched(everything(plain), checked)
    checked.close()
    plain.close()


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "bnpo", "gspo", "cispo"])
def test_every_loss_passes(engine, loss_type):
    check(engine, objective=Objective(loss_type=loss_type, beta=0.0, max_completion_length=5), pack_tokens=35)


@pytest.mark.parametrize("pack_tokens", [0, 35])
def test_an_entropy_bonus_passes(engine, pack_tokens):
    objective = Objective(beta=0.0, entropy_coef=0.1, max_completion_length=5)
    check(engine, objective=objective, pack_tokens=pack_tokens)


def test_a_model_that_does_not_pack_passes(engine):
    engine.policy.packs = False
    check(engine)


def test_a_pad_token_that_is_eos_passes(engine):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    check(engine, tokenizer=tokenizer)


# --- each check finds its fault -----------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_refused(engine):
    engine.model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(PreflightError, match=r"model.layers.1.mlp.down_proj.weight is not finite"):
        check(engine)


def test_dropout_is_found_by_its_ratio(engine):
    def drop(layer, inputs, output):
        return torch.nn.functional.dropout(output, 0.1, training=layer.training)

    hook = engine.model.model.layers[0].mlp.register_forward_hook(drop)
    refused(engine, "first ratio is not 1.*as dropout would")
    hook.remove()
    check(engine)


def test_completions_that_see_each_other_are_found_by_their_log_probs(engine, monkeypatch):
    """Let the completions of the second row see the padding behind its prompt."""
    build = attention.PackedAttention.__init__

    def leaking(self, rows, dtype):
        build(self, rows, dtype)
        self.prompts[2:] = self.longest

    monkeypatch.setattr(attention.PackedAttention, "__init__", leaking)
    refused(engine, "Packed rows and single completions differ in log-probs")


def test_a_mask_made_from_the_pad_token_is_found_by_its_eos(engine, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    together = Sampler.pad_rows

    def not_pad(self, rows):
        made = together(self, rows)
        return Completions(made.ids, made.ids != self.tokenizer.pad_token_id, made.ended)

    monkeypatch.setattr(Sampler, "pad_rows", not_pad)
    refused(engine, "EOS outside the mask", tokenizer=tokenizer)


def test_an_eos_without_weight_is_found(engine, monkeypatch):
    weigh = module.step_weights

    def cut(counted, parts, here, objective):
        weights = weigh(counted, parts, here, objective)
        last = counted.sum(dim=1, keepdim=True) - 1
        return weights.scatter(1, last, 0.0)

    monkeypatch.setattr(module, "step_weights", cut)
    refused(engine, "EOS outside the mask")


def test_a_token_too_few_is_found(engine, monkeypatch):
    together = Sampler.pad_rows

    def short(self, rows):
        made = together(self, rows)
        mask = made.mask.clone()
        mask[1, -3:] = False
        return Completions(made.ids, mask, made.ended)

    monkeypatch.setattr(Sampler, "pad_rows", short)
    refused(engine, "2 tokens of a completion of 3")


@pytest.mark.parametrize("layout", ["offload", "offload, bf16 masters", "on the card", "stage 0"])
def test_a_lost_backward_is_found_by_its_gradient(tiny_folder, tmp_path, layout):
    """DeepSpeed 0.15.2 to 0.18.9 lost the earlier of several backwards a step."""
    engine = make_engine(tiny_folder, tmp_path, layout)
    backward = engine.backward

    def losing(loss, *, last=True):
        if last:
            engine.abandon()
        backward(loss, last=last)

    engine.backward = losing
    refused(engine, "gradient of .* in DeepSpeed is off by .* from autograd", pack_tokens=35)
    check(engine)  # with one backward only
    engine.close()


def test_gradients_of_the_wrong_scale_and_stale_ones_are_found(engine):
    backward = engine.backward
    engine.backward = lambda loss, *, last=True: backward(loss / 2, last=last)
    refused(engine, r"off by 50.0% from autograd")
    engine.backward = backward
    take = engine.gradient
    engine.gradient = lambda parameter: take(parameter) + 0.01 * take(parameter).norm()
    refused(engine, "from autograd")


def test_a_loss_that_reaches_no_weight_is_found(engine):
    hook = engine.policy.register_forward_hook(lambda policy, rows, logprobs: logprobs - logprobs * 1.0)
    engine.policy.packs = False
    refused(engine, "No finite gradient")
    hook.remove()


def test_a_generation_config_that_is_not_neutral_is_named(engine):
    engine.model.generation_config.update(top_k=20, repetition_penalty=1.1)
    error = refused(engine, "not neutral")
    assert "top_k 20" in str(error) and "repetition_penalty 1.1" in str(error)
    assert generation_config_problems(None) == []


def test_all_that_is_wrong_is_told_at_once(engine):
    engine.model.generation_config.update(top_p=0.8)
    backward = engine.backward
    engine.backward = lambda loss, *, last=True: backward(loss / 2, last=last)
    error = refused(engine, "top_p 0.8")
    assert "from autograd" in str(error)
