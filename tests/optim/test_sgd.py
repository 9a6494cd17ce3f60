"""CPUSGD makes torch's steps, and those of an fp32 master whatever a bf16 master holds."""

import copy

import pytest
import torch

from grpo_ds.errors import UsageError
from grpo_ds.optim import CPUSGD, build_optimizer, native, slices
from grpo_ds.optim.cpu_optimizer import NonFiniteGradient

TAIL = 40 * 256 + 77  # forty full blocks and a short one
SETTINGS = {"lr": 3e-2, "weight_decay": 0.1}


def values(n, seed, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def master(start):
    """A parameter that takes gradients of any dtype."""
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad_dtype = None
    return parameter


def trained(parameter, steps=5, first=0, optimizer=None, dtype=torch.float32, **settings):
    optimizer = optimizer or CPUSGD([parameter], **{**SETTINGS, **settings})
    for step in range(first, steps):
        parameter.grad = values(parameter.numel(), step, dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("n", [1, 255, 256, TAIL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_steps_are_those_of_torch(engine, n, dtype):
    """dtype: of the gradients."""
    ours, theirs = (master(values(n, 99)) for _ in range(2))
    trained(ours, dtype=dtype)
    reference = torch.optim.SGD([theirs], **SETTINGS)
    for step in range(5):
        theirs.grad = values(n, step, dtype).float()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_residual_makes_the_steps_of_an_fp32_master(engine):
    start = values(TAIL, 99, torch.bfloat16)
    half, full = master(start), master(start.float())
    optimizer = trained(half, rounding="residual", lr=1e-4)
    trained(full, lr=1e-4)
    state = optimizer.state[half]
    assert set(state) == {"step", "residual"} and state["residual"].dtype == torch.int16
    assert torch.equal(slices.join(half.detach(), state["residual"]), full.detach())


@pytest.mark.parametrize("rounding", ["residual8", "stochastic"])
def test_what_is_lost_is_rounded_without_a_bias(engine, rounding):
    """The mean over seeds of many small steps is the fp32 master's end."""
    start, ends = torch.full((TAIL,), 1.0, dtype=torch.bfloat16), []
    for seed in range(4):
        half = master(start)
        optimizer = CPUSGD([half], lr=1e-5, rounding=rounding, seed=seed)
        for _ in range(20):
            half.grad = torch.ones(TAIL)
            optimizer.step()
        state = optimizer.state[half]
        ends.append(slices.join(half.detach(), state["residual"]) if "residual" in state else half.detach().float())
    assert torch.stack(ends).mean() == pytest.approx(1 - 20e-5, abs=2e-5)
    lost = master(start)
    trained_nearest = CPUSGD([lost], lr=1e-5)
    for _ in range(20):
        lost.grad = torch.ones(TAIL)
        trained_nearest.step()
    assert torch.equal(lost.detach(), start)  # what the roundings are for


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("rounding", ["nearest", "residual", "residual8", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_makes_the_same_steps(rounding, dtype):
    ends = []
    for path in native.PATHS:
        parameter = torch.nn.Parameter(values(TAIL, 99, dtype))
        optimizer = CPUSGD([parameter], **SETTINGS, rounding=rounding, seed=3)
        state = optimizer._new_state(parameter)
        key = 12345 if "noise" in state else None
        native.native_sgd_step(parameter.data, values(TAIL, 1, dtype), state, SETTINGS, noise_key=key, path=path)
        ends.append((parameter.detach().clone(), state.get("residual", torch.zeros(1))))
    for end, residual in ends[1:]:
        assert torch.equal(end, ends[0][0]) and torch.equal(residual, ends[0][1])


@pytest.mark.parametrize("rounding", ["residual", "residual8", "stochastic"])
def test_a_loaded_state_goes_on_bit_by_bit(engine, rounding):
    start = values(TAIL, 99, torch.bfloat16)
    whole, first = master(start), master(start)
    trained(whole, rounding=rounding, seed=7)
    saved = copy.deepcopy(trained(first, steps=2, rounding=rounding, seed=7).state_dict())
    second = master(first.detach())
    optimizer = CPUSGD([second], **SETTINGS, rounding=rounding, seed=8)
    optimizer.load_state_dict(saved)
    trained(second, first=2, optimizer=optimizer)
    assert torch.equal(second, whole)


def test_a_gradient_that_is_not_finite_changes_nothing(engine):
    parameter = torch.nn.Parameter(values(TAIL, 99))
    before, optimizer = parameter.detach().clone(), CPUSGD([("head.weight", parameter)], **SETTINGS)
    parameter.grad = values(TAIL, 0)
    parameter.grad[4711] = torch.nan
    with pytest.raises(NonFiniteGradient, match=r"head\.weight .* element 4711"):
        optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "lr is -1.0, but CPUSGD needs 0 or more"),
        ({"rounding": "up"}, "rounding is 'up'; it must be one of"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(UsageError, match=said):
        CPUSGD([torch.nn.Parameter(torch.ones(3))], **settings)


def test_it_is_built_by_its_name():
    built = build_optimizer([torch.nn.Parameter(torch.ones(3))], "SGD", offload=True, rounding="residual8", **SETTINGS)
    assert isinstance(built, CPUSGD) and built.rounding == "residual8"
