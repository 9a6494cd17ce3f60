"""fp16 with a loss scale, through real ZeRO on a CPU: an overflow skips a step and changes nothing but the scale."""

import json
from itertools import pairwise

import pytest
import torch

from grpo_ds.core.objective import Objective
from grpo_ds.errors import NumbersError, PreflightError, UsageError
from grpo_ds.run_folder.resume import to_resume
from grpo_ds.system import ranks
from grpo_ds.training.preflight import preflight
from grpo_ds.training.sampling import Sampler
from tests.conftest import make_tokenizer
from tests.training import test_resume
from tests.training.layouts import assert_untouched, everything, make_engine, rollout_of, take_step
from tests.training.test_engine import run_ranks
from tests.training.test_nonfinite import CAUSES, poison

pytestmark = pytest.mark.usefixtures("fp16_on_cpu")
LAYOUTS = ["offload", "offload, own staging", "stage 1, offload", "on the card", "stage 1, bf16"]
SCALE = 2.0**16
DS = json.loads((test_resume.ROOT / "ds_configs/zero2.json").read_text())


def scaler(engine):
    """The scale and its counters."""
    return dict(vars(engine._engine.optimizer.loss_scaler))


def overflow_once(engine, rollout, **options):
    """An update in which one element of a gradient overflows."""
    hook = poison(engine.model.model.layers[1].mlp.up_proj.weight, torch.inf)
    done = take_step(engine, rollout, **options)
    hook.remove()
    return done


@pytest.mark.parametrize("pack_tokens", [0, 35])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_leaves_no_trace_but_half_the_scale(tiny_folder, tmp_path, layout, pack_tokens):
    """Later steps are those of a run that began with half the scale, bit for bit."""
    rollout, options = rollout_of(), {"pack_tokens": pack_tokens}
    engine = make_engine(tiny_folder, tmp_path, layout, fp16={})
    half = make_engine(tiny_folder, tmp_path, layout, fp16={"initial_scale_power": 15})
    before = everything(engine)
    done = overflow_once(engine, rollout, **options)
    metrics = done.tally.means()
    assert done.overflow and not done.bad
    assert (metrics["overflow_steps"], metrics["bad_steps"], metrics["loss_scale"]) == (1, 0, SCALE)
    assert_untouched(before, engine)
    assert engine.loss_scale.value == SCALE / 2
    for _ in range(2):
        one, two = (take_step(each, rollout, **options) for each in (engine, half))
        assert not one.overflow and one.tally.means() == two.tally.means()
        assert one.tally.means()["loss_scale"] == SCALE / 2 and one.tally.means()["overflow_steps"] == 0
    assert not torch.equal(before[0][0], next(engine.policy.parameters()))
    assert_untouched(everything(half), engine)
    engine.close()
    half.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_step_are_those_of_fp32(tiny_folder, tmp_path, layout):
    """The logged norm is unscaled, and so are the gradients that are clipped."""
    engines = make_engine(tiny_folder, tmp_path, layout, fp16={}), make_engine(tiny_folder, tmp_path, "offload")
    assert next(engines[0].policy.parameters()).dtype == torch.float16
    assert all(group["params"][0].dtype == torch.float32 for group in engines[0]._engine.optimizer.param_groups)
    one, two = ([take_step(e, rollout_of()).tally.means()["grad_norm"] for _ in range(3)] for e in engines)
    assert one == pytest.approx(two, rel=5e-3)  # fp16 has 11 bits, and the second norm depends on the first step
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_after_which_the_scale_grows_is_an_ordinary_step(tiny_folder, tmp_path, layout):
    """Without clipping, which would hide it, DeepSpeed's own order of things halves the gradients of this step."""
    grows = make_engine(tiny_folder, tmp_path, layout, fp16={"loss_scale_window": 1}, clipping=0)
    stays = make_engine(tiny_folder, tmp_path, layout, fp16={}, clipping=0)
    for _ in range(2):
        one, two = (take_step(engine, rollout_of()) for engine in (grows, stays))
        assert one.tally.means() == two.tally.means()
    assert (grows.loss_scale.value, stays.loss_scale.value) == (2 * SCALE, SCALE)
    assert_untouched(everything(stays), grows)
    grows.close()
    stays.close()


def test_at_its_minimum_an_overflow_is_a_bad_step_with_a_remedy_of_its_own(tiny_folder, tmp_path):
    engine = make_engine(tiny_folder, tmp_path, "offload", fp16={"initial_scale_power": 1})
    assert overflow_once(engine, rollout_of()).overflow and engine.loss_scale.value == 1
    before, counters = everything(engine), scaler(engine)
    done = overflow_once(engine, rollout_of())
    assert done.bad == ["gradient at the smallest loss scale (model.model.layers.1.mlp.up_proj.weight)"]
    assert not done.overflow and done.tally.means()["bad_steps"] == 1
    assert_untouched(before, engine)
    assert scaler(engine) == counters
    engine.close()


def test_a_scale_that_is_set_by_hand_stays(tiny_folder, tmp_path):
    engine = make_engine(tiny_folder, tmp_path, "offload", fp16={"loss_scale": 512})
    assert take_step(engine, rollout_of()).tally.means()["loss_scale"] == 512
    assert overflow_once(engine, rollout_of()).bad[0].startswith("gradient at the smallest loss scale")
    assert engine.loss_scale.value == 512
    engine.close()


def test_hysteresis_lets_an_overflow_pass_before_the_scale_falls(tiny_folder, tmp_path):
    engine = make_engine(tiny_folder, tmp_path, "offload", fp16={"hysteresis": 2, "initial_scale_power": 0})
    assert overflow_once(engine, rollout_of()).overflow  # the first, even at the minimum
    assert overflow_once(engine, rollout_of()).bad
    engine.close()


@pytest.mark.parametrize("what", CAUSES)
def test_other_numbers_that_are_not_finite_are_bad_steps_as_ever(tiny_folder, tmp_path, what):
    spoil, wanted = CAUSES[what]
    engine, rollout = make_engine(tiny_folder, tmp_path, "offload", fp16={}), rollout_of()
    spoil(rollout)
    before, counters = everything(engine), scaler(engine)
    done = take_step(engine, rollout)
    assert done.bad[0] == wanted[0] and not done.overflow
    assert_untouched(before, engine)
    assert scaler(engine) == counters  # nothing that the scale could mend
    engine.close()


def test_a_log_prob_that_is_not_finite_is_a_bad_step(tiny_folder, tmp_path):
    engine = make_engine(tiny_folder, tmp_path, "offload", fp16={})
    engine.model.model.norm.weight.data[5] = torch.inf
    done = take_step(engine, rollout_of())
    assert done.bad[0].startswith("log-prob (") and not done.overflow and engine.loss_scale.value == SCALE
    engine.close()


# --- around the steps -------------------------------------------------------------------------------------


def check(engine, *, pack_tokens=0):
    sampler = Sampler(engine.model, make_tokenizer(), max_completion_length=5)
    objective = Objective(beta=0.1, max_completion_length=5)
    preflight(engine, sampler, ranks.start(), objective=objective, pack_tokens=pack_tokens)


@pytest.mark.parametrize("pack_tokens", [0, 35])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_preflight_and_rehearsal_leave_no_trace(tiny_folder, tmp_path, layout, pack_tokens):
    engine = make_engine(tiny_folder, tmp_path, layout, fp16={"initial_scale_power": 32})  # a run's own overflows
    plain = make_engine(tiny_folder, tmp_path, layout, fp16={"initial_scale_power": 32})
    before, counters = everything(engine), scaler(engine)
    check(engine, pack_tokens=pack_tokens)
    assert_untouched(before, engine)
    assert scaler(engine) == counters
    engine.rehearse(rows for rows, _ in rollout_of().micro_batches(pack_tokens))
    assert scaler(engine) == counters
    for each in (engine, plain):
        vars(each._engine.optimizer.loss_scaler)["cur_scale"] = SCALE
    one, two = (take_step(each, rollout_of(), pack_tokens=pack_tokens) for each in (engine, plain))
    assert one.tally.means() == two.tally.means()
    assert_untouched(everything(plain), engine)
    engine.close()
    plain.close()


def test_preflight_finds_a_wrong_gradient_in_fp16(tiny_folder, tmp_path):
    engine = make_engine(tiny_folder, tmp_path, "offload", fp16={})
    backward = engine.backward
    engine.backward = lambda loss, *, last=True: backward(1.1 * loss, last=last)
    with pytest.raises(PreflightError, match=r"in DeepSpeed is off by 10\.\d% from autograd's"):
        check(engine)
    engine.close()


def test_preflight_names_a_model_that_overflows_fp16(tiny_folder, tmp_path):
    engine = make_engine(tiny_folder, tmp_path, "offload", fp16={})
    engine.model.model.layers[0].mlp.up_proj.weight.data.fill_(6e4)  # its products are above 65,504
    with pytest.raises(PreflightError, match="fp16 cannot hold this model's activations") as error:
        check(engine)
    assert '"bf16": {"enabled": false}' in str(error.value)
    engine.close()


def test_without_a_card_fp16_is_refused_before_anything_is_built(tiny_folder, tmp_path, monkeypatch):
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: None)  # its answer on most CPUs
    with pytest.raises(UsageError, match="does not compute in fp16 on this CPU"):
        make_engine(tiny_folder, tmp_path, "offload", fp16={})


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["all parameters", "LoRA"])
def kind(request, tmp_path, monkeypatch):
    """A kind of run of test_resume.py in fp16 whose scale falls and grows within its eight updates."""
    file = tmp_path / "fp16.json"
    file.write_text(json.dumps({**DS, "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 1}}))
    changes = {"lora_r": 4, "lora_alpha": 8} if request.param == "LoRA" else {}
    monkeypatch.setitem(test_resume.KINDS, request.param, (changes, str(file), False))
    return request.param


def test_a_run_in_fp16_interrupted_and_resumed_is_the_same_run(kind, tiny_folder, tmp_path):
    run = test_resume.make_run(tiny_folder, kind, tmp_path / "straight")
    metrics, weights = test_resume.finish(run)
    wanted, scales = scaler(run.trainer.engine), [line["loss_scale"] for line in metrics]
    assert sum(line["overflow_steps"] for line in metrics) > 0 and sum(line["bad_steps"] for line in metrics) == 0
    assert any(one > two for one, two in pairwise(scales)) and any(one < two for one, two in pairwise(scales))
    assert all(weight.isfinite().all() for weight in weights.values())
    for when in (None, 12, 30):
        folder = tmp_path / str(when)
        assert test_resume.stop_at(test_resume.make_run(tiny_folder, kind, folder), when) is not None
        origin, _ = to_resume("auto", folder)
        again = test_resume.make_run(tiny_folder, kind, folder, origin)
        lines, state = test_resume.finish(again)
        assert lines == metrics
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())
        assert scaler(again.trainer.engine) == wanted


def test_overflows_are_told_and_spend_no_bad_steps(kind, tiny_folder, tmp_path):
    run = test_resume.make_run(tiny_folder, kind, tmp_path / "run")
    trainer, said = run.trainer, []
    trainer.console.line, trainer.bad_steps.limit = said.append, 0  # the first bad step ends the run
    hook = poison(next(p for p in trainer.engine.policy.parameters() if p.requires_grad), torch.inf)
    power = int(trainer.engine.loss_scale.value).bit_length() - 1
    with pytest.raises(NumbersError, match="gradient at the smallest loss scale") as error:
        while True:
            trainer.step(trainer.progress.global_step, run.questions)
    hook.remove()
    told = [line for line in said if "overflows fp16" in line]
    assert len(told) == power and told[-1].endswith("Loss scale now 1.")
    assert "fp16 is too narrow" in str(error.value)
    trainer.engine.close()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_on_a_quantised_base_trains_in_fp16(tiny_folder, tmp_path, monkeypatch, bits):
    changes = {"lora_r": 4, "lora_alpha": 8, bits: True, "num_iterations": 1, "num_steps": 1}
    (tmp_path / "fp16.json").write_text(json.dumps({**DS, "fp16": {"enabled": True, "initial_scale_power": 10}}))
    monkeypatch.setitem(test_resume.KINDS, bits, (changes, str(tmp_path / "fp16.json"), False))
    run = test_resume.make_run(tiny_folder, bits, tmp_path / "run")
    policy = run.trainer.engine.policy
    trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float16} == {policy.model.dtype}
    metrics = run.trainer.step(0, run.questions)
    assert metrics["overflow_steps"] == 0 == metrics["bad_steps"] and metrics["grad_norm"] > 0
    assert any(not torch.equal(p, trained[name]) for name, p in policy.named_parameters() if p.requires_grad)
    run.trainer.engine.close()


def test_two_ranks_skip_the_same_step(tiny_folder, tmp_path):
    """The gradient of the second rank alone overflows."""
    run_ranks("engine_fp16.py", tiny_folder, tmp_path, ranks=2)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["overflows"] == two["overflows"] == [False, True, False]
    assert one["scales"] == two["scales"] == [SCALE, SCALE, SCALE / 2]
    assert all(torch.equal(one["weights"][name], weight) for name, weight in two["weights"].items())
    assert one["moved"] == two["moved"] == [True, False, True]
