"""CPUAdamW8bit makes bitsandbytes' steps: the same codes and scales, block by block, and the same weights to an ulp."""

import copy
import subprocess
import sys

import pytest
import torch

from grpo_ds.errors import UsageError
from grpo_ds.optim import CPUAdamW8bit, build_optimizer, native, slices
from grpo_ds.optim.cpu_optimizer import NonFiniteGradient

bitsandbytes = pytest.importorskip("bitsandbytes")

TAIL = 40 * 256 + 77  # forty full blocks and a short one
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


def gradients(kind, n, step):
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(n, generator=generator)
    return {
        "random": lambda: noise,
        "tiny": lambda: noise * 1e-12,
        "huge": lambda: noise * 1e17,
        "zero": lambda: torch.zeros(n),
        "denormal": lambda: noise * 1e-40,  # the gradient is subnormal and its square is 0
        "denormal square": lambda: noise * 1e-21,  # the second moment is subnormal and its scale has no inverse
        "eight decades": lambda: noise * 10 ** (-8 * torch.rand(n, generator=generator)),
        "sparse": lambda: noise * (torch.rand(n, generator=generator) < 0.02),  # some blocks are all zero, some not
    }[kind]()


KINDS = ["random", "tiny", "huge", "zero", "denormal", "denormal square", "eight decades", "sparse"]


def one_step(optimizer, parameter, gradient):
    parameter.grad = gradient.clone()
    optimizer.step()


def pair(n, dtype=torch.float32, **settings):
    """The same parameter under our optimizer and under bitsandbytes'."""
    settings = {**SETTINGS, **settings}
    start = torch.randn(n, generator=torch.Generator().manual_seed(99)).to(dtype)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    return (CPUAdamW8bit([ours], **settings), ours), (bitsandbytes.optim.AdamW8bit([theirs], **settings), theirs)


def assert_same_moments(state, expected):
    for key in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
        assert torch.equal(state[key], expected[key]), key
    assert state["step"] == expected["step"]


def assert_same_to_an_ulp(parameter, expected, steps):
    """Allow a difference of one ulp a step. torch computes roots with MKL, which rounds some of them differently, and
    it divides twice where we divide once. So an update differs by a few roundings, and the weight by up to an ulp."""
    size = expected.detach().float().abs()
    ulp = (torch.nextafter(size, torch.tensor(float("inf"))) - size) * (
        2**16 if expected.dtype == torch.bfloat16 else 1
    )
    update_error = 2**-22 * 10 * SETTINGS["lr"]  # Adam's update is at most about ten times the learning rate
    assert ((parameter.float() - expected.float()).abs() <= steps * (ulp + update_error)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_gets_the_codes_and_scales_bitsandbytes_gives_it(engine, kind):
    (ours, p), (theirs, q) = pair(TAIL)
    for step in range(1, 7):
        gradient = gradients(kind, TAIL, step)
        one_step(ours, p, gradient)
        one_step(theirs, q, gradient)
        assert_same_moments(ours.state[p], theirs.state[q])
        assert_same_to_an_ulp(p, q, step)


@pytest.mark.parametrize("n", [4096, 4097, 5000, 2 * 1024 * 256 + 1, 800_001])
def test_any_number_of_elements_leaves_no_element_out(engine, n):
    (ours, p), (theirs, q) = pair(n)
    for step in (1, 2, 3):
        one_step(ours, p, gradients("random", n, step))
        one_step(theirs, q, gradients("random", n, step))
    assert_same_moments(ours.state[p], theirs.state[q])
    assert_same_to_an_ulp(p, q, 3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_and_a_changing_learning_rate_work_as_in_bitsandbytes(engine, weight_decay, dtype):
    (ours, p), (theirs, q) = pair(TAIL, dtype, weight_decay=weight_decay)
    for step in range(1, 6):
        for optimizer, parameter in ((ours, p), (theirs, q)):
            optimizer.param_groups[0]["lr"] = 1e-2 / step
            one_step(optimizer, parameter, gradients("random", TAIL, step).to(dtype))
        assert_same_to_an_ulp(p, q, step)
    assert_same_moments(ours.state[p], theirs.state[q])


def test_bf16_gradients_update_an_fp32_parameter_like_their_fp32_values(engine):
    (narrow, p), _ = pair(TAIL)
    (wide, q), _ = pair(TAIL)
    q.grad_dtype = p.grad_dtype = None  # torch 2.9 and later: a gradient may differ from its parameter in dtype
    for step in (1, 2, 3):
        gradient = gradients("random", TAIL, step).bfloat16()
        one_step(narrow, p, gradient)
        one_step(wide, q, gradient.float())
    assert_same_moments(narrow.state[p], wide.state[q])
    assert torch.equal(p, q)


def test_groups_keep_their_own_settings_and_tensors_without_gradient_their_values(engine):
    n = 5000
    start = torch.randn(n)
    fast, slow, idle = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizer = CPUAdamW8bit([{"params": [fast], "lr": 1e-1}, {"params": [slow, idle]}], lr=1e-3)
    fast.grad = slow.grad = torch.ones(n)
    optimizer.step()
    # The first step of Adam is the learning rate times the sign of the gradient.
    torch.testing.assert_close(start - fast, torch.full((n,), 1e-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(start - slow, torch.full((n,), 1e-3), rtol=1e-3, atol=1e-6)
    assert torch.equal(idle, start) and idle not in optimizer.state


def test_small_tensors_keep_fp32_moments_as_in_bitsandbytes(engine):
    (ours, p), (theirs, q) = pair(100)
    for step in (1, 2, 3):
        one_step(ours, p, gradients("random", 100, step))
        one_step(theirs, q, gradients("random", 100, step))
    assert ours.state[p]["state1"].dtype == torch.float32
    assert torch.equal(p, q) and torch.equal(ours.state[p]["state2"], theirs.state[q]["state2"])


def test_an_empty_partition_takes_its_steps(engine):
    parameter = torch.nn.Parameter(torch.empty(0))
    optimizer = CPUAdamW8bit([parameter])
    one_step(optimizer, parameter, torch.empty(0))
    assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("n", [TAIL, 100])
def test_a_state_dict_moves_to_bitsandbytes_and_back(engine, n):
    (ours, p), (theirs, q) = pair(n)
    for step in (1, 2):
        one_step(ours, p, gradients("random", n, step))
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    q.data.copy_(p.data)
    one_step(theirs, q, gradients("random", n, 3))
    (again, r), _ = pair(n)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))  # as bitsandbytes writes it, wrapped for FSDP
    r.data.copy_(q.data)
    one_step(ours, p, gradients("random", n, 3))
    for optimizer, parameter in ((ours, p), (theirs, q), (again, r)):
        one_step(optimizer, parameter, gradients("random", n, 4))
        for key in ("state1", "state2"):
            assert torch.equal(optimizer.state[parameter][key], ours.state[p][key])
        assert optimizer.state[parameter]["step"] == 4
        assert_same_to_an_ulp(parameter, p, 4)


def test_a_resumed_run_takes_bit_identical_steps(engine, tmp_path):
    (straight, p), _ = pair(TAIL, torch.bfloat16)
    for step in (1, 2):
        one_step(straight, p, gradients("random", TAIL, step).bfloat16())
    torch.save({"optimizer": straight.state_dict(), "parameter": p.data}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    (resumed, q), _ = pair(TAIL, torch.bfloat16)
    resumed.load_state_dict(saved["optimizer"])
    q.data.copy_(saved["parameter"])
    for optimizer, parameter in ((straight, p), (resumed, q)):
        one_step(optimizer, parameter, gradients("random", TAIL, 3).bfloat16())
    assert_same_moments(straight.state[p], resumed.state[q])
    assert resumed.state[q]["absmax1"].dtype == torch.float32
    assert torch.equal(p, q)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_gradient_refuses_the_step_before_anything_changes_and_is_named(engine, value, dtype):
    good, bad = (torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (5000, 700_000))
    optimizer = CPUAdamW8bit([("embed.weight", good), ("head.weight", bad)], lr=1e-2)
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    optimizer.step()
    before = copy.deepcopy((good.data, bad.data, optimizer.state_dict()["state"]))
    bad.grad[[666_666, 699_999]] = value
    with pytest.raises(NonFiniteGradient, match=r"head\.weight .* element 666666"):
        optimizer.step()
    assert torch.equal(good, before[0]) and torch.equal(bad, before[1])
    for index, parameter in enumerate((good, bad)):
        assert_same_moments(optimizer.state[parameter], before[2][index])


def test_the_largest_gradient_that_is_taken_leaves_finite_moments(engine):
    (optimizer, p), _ = pair(5000)
    largest = torch.nextafter(torch.tensor(2.0**64), torch.tensor(0.0)).expand(5000)
    for _ in range(3):
        one_step(optimizer, p, largest)
    assert optimizer.state[p]["absmax2"].isfinite().all() and p.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("path", native.PATHS)
def test_every_instruction_set_takes_the_same_steps(path):
    if native.PATHS.index(path) > native.PATHS.index(native.best_path()):
        pytest.skip(f"this processor has no {path}")
    (ours, p), _ = pair(TAIL)
    (theirs, q), _ = pair(TAIL)
    for step in range(1, 5):
        gradient = gradients("eight decades", TAIL, step)
        one_step(ours, p, gradient)
        state = theirs.state[q] or theirs._new_state(q)
        theirs.state[q] = {**state, "step": step}
        native.native_step(q.data, gradient, theirs.state[q], theirs.param_groups[0], path=path)
    assert_same_moments(ours.state[p], theirs.state[q])
    assert torch.equal(p, q)


def test_bf16_with_its_residual_equals_the_fp32_master_bit_by_bit_over_fifty_steps(engine):
    (fp32, p), _ = pair(TAIL, lr=1e-6)  # bf16 alone would not change at this learning rate
    half, residual = slices.split(p.data.clone())
    q = torch.nn.Parameter(half)
    lossless = CPUAdamW8bit([q], **{**SETTINGS, "lr": 1e-6}, rounding="residual")
    p.grad_dtype = None
    for step in range(1, 51):
        gradient = gradients("random", TAIL, step).bfloat16()
        q.grad = gradient.clone()
        if step == 1:  # start from a master that is not a bf16 number
            lossless.state[q] = lossless._new_state(q)
            lossless.state[q]["residual"].copy_(residual)
        lossless.step()
        one_step(fp32, p, gradient)
    assert torch.equal(slices.join(q.data, lossless.state[q]["residual"]), p.data)
    assert_same_moments(lossless.state[q], fp32.state[p])


def stochastic(values, seed=0, lr=1e-6, rounding="stochastic"):
    p = torch.nn.Parameter(values.bfloat16())
    return CPUAdamW8bit([p], **{**SETTINGS, "lr": lr, "weight_decay": 0.0}, rounding=rounding, seed=seed), p


def test_stochastic_rounding_changes_weights_that_nearest_would_not_and_is_right_on_average(engine):
    """Weights of 1.0, constant gradient: each Adam step is -1e-5, a 390th of bf16's spacing below 1."""
    optimizer, p = stochastic(torch.ones(200_000), lr=1e-5)
    for _ in range(20):
        one_step(optimizer, p, torch.ones(200_000).bfloat16())
    moved = 1 - p.double()
    assert (moved == 0).double().mean() > 0.9  # one weight in twenty has moved, by a full spacing
    assert moved.mean().item() == pytest.approx(20e-5, rel=0.05)  # a standard error of 1 percent


def test_the_noise_depends_on_seed_and_step_and_is_kept_in_a_state_dict(engine):
    values, gradient = torch.linspace(-1, 1, TAIL), gradients("random", TAIL, 1)
    runs = []
    for seed, restart in ((0, False), (0, True), (1, False)):
        optimizer, p = stochastic(values, seed)
        for step in range(4):
            if restart and step == 2:
                saved, before = copy.deepcopy(optimizer.state_dict()), p.data.clone()
                optimizer, p = stochastic(values, seed=7)  # the seed of the state dict is used
                p.data.copy_(before)
                optimizer.load_state_dict(saved)
            one_step(optimizer, p, gradient.bfloat16())
        runs.append(p.data)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@needs_compiler
@pytest.mark.parametrize("path", native.PATHS)
def test_both_engines_make_the_same_noise(path):
    if native.PATHS.index(path) > native.PATHS.index(native.best_path()):
        pytest.skip(f"this processor has no {path}")
    optimizer, p = stochastic(torch.zeros(TAIL))
    state = {**optimizer._new_state(p), "step": 1}
    group = {**optimizer.param_groups[0], "lr": 0.0}  # with a step of 0 the stored value is the rounding of p
    masters = torch.randn(TAIL)
    p.data.copy_(slices.round_stochastically(masters, 42))
    again = p.data.clone()
    native.native_step(p.data, torch.zeros(TAIL), state, group, noise_key=43, path=path)
    assert torch.equal(p.data, again)  # noise does not change a bf16 number
    near = {bits.item() for bits in ((p.view(torch.int16).int() << 16) - masters.view(torch.int32)).abs().unique()}
    assert max(near) < 0x10000  # one of the two neighbours


def test_stochastic_rounding_is_unbiased_between_two_neighbours():
    third = torch.tensor(1.0 + 2**-7 / 3)
    keys = torch.randint(2**32, (300,)).tolist()
    mean = torch.stack([slices.round_stochastically(third.expand(1000).clone(), key) for key in keys]).double()
    assert mean.mean().item() == pytest.approx(third.item(), abs=3 * 2**-7 * 0.48 / 300_000**0.5 + 2**-23)


def test_splitting_loses_no_bit_of_any_number():
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (1 << 20,), dtype=torch.int64, generator=generator).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 0x8000  # halfway between two bf16 numbers
    bits = torch.cat([anything, ties, ties - 1, ties + 1])
    half, residual = slices.split(bits.view(torch.float32))
    assert torch.equal(slices.join(half, residual).view(torch.int32), bits)
    finite = torch.randn(100_000, generator=generator)
    finite = finite[finite.view(torch.int32) & 0xFFFF != 0x8000]
    assert torch.equal(slices.split(finite)[0], finite.bfloat16())  # apart from ties it is torch's rounding


# Computed codes of the moments, and a residual of 8 bits.


def companded(start, **settings):
    p = torch.nn.Parameter(start.clone())
    return CPUAdamW8bit([p], **{**SETTINGS, **settings}, moments="companded"), p


def moments_of(optimizer, p):
    state = optimizer.state[p]
    first = slices.decode_first(state["state1"], state["absmax1"])
    return first, slices.decode_root(state["state2"], state["absmax2"])


@pytest.mark.parametrize("kind", KINDS)
def test_computed_codes_follow_adam_in_fp32(engine, kind):
    """Moments are off by a few of their codes' steps, the weights by a twentieth of what Adam has moved them."""
    start = torch.randn(TAIL, generator=torch.Generator().manual_seed(99))
    (ours, p), q = companded(start, weight_decay=0.0), torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([q], **{**SETTINGS, "weight_decay": 0.0})
    for step in range(1, 9):
        gradient = gradients(kind, TAIL, step)
        one_step(ours, p, gradient)
        one_step(theirs, q, gradient)
    first, root = moments_of(ours, p)
    assert first.isfinite().all() and root.isfinite().all() and p.isfinite().all()
    if kind in ("random", "huge"):
        wanted = theirs.state[q]
        assert ((first - wanted["exp_avg"]).abs() <= 0.06 * wanted["exp_avg"].abs().max()).all()
        assert ((root - wanted["exp_avg_sq"].sqrt()).abs() <= 0.03 * wanted["exp_avg_sq"].sqrt().max()).all()
        off, moved = (p - q).double(), (q - start).double()
        assert off.norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_compute_the_same_codes(kind, monkeypatch):
    """Fused multiply-adds and torch's roots may move a value that lies between two codes."""
    if native.library() is None:
        pytest.skip("no C++ compiler on this machine")
    start = torch.randn(TAIL, generator=torch.Generator().manual_seed(99))
    (fast, p), (slow, q) = companded(start), companded(start)
    monkeypatch.setattr(slices, "SLICE", 16 * 256)
    for step in range(1, 4):
        one_step(fast, p, gradients(kind, TAIL, step))
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            one_step(slow, q, gradients(kind, TAIL, step))
        for key in ("state1", "state2"):
            codes, others = (it.state[r][key].int() for it, r in ((fast, p), (slow, q)))
            steps = (codes - others).abs() % 254  # 255 is the code -1 of the first moment
            assert int(steps.max()) <= 1 and float((steps > 0).double().mean()) < 2e-3
        torch.testing.assert_close(p.data, q.data, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("path", native.PATHS)
def test_every_instruction_set_computes_the_same_codes(path):
    if native.PATHS.index(path) > native.PATHS.index(native.best_path()):
        pytest.skip(f"this processor has no {path}")
    start = torch.randn(TAIL, generator=torch.Generator().manual_seed(99))
    (ours, p), (theirs, q) = companded(start), companded(start)
    for step in range(1, 5):
        gradient = gradients("eight decades", TAIL, step)
        one_step(ours, p, gradient)
        theirs.state[q] = {**(theirs.state[q] or theirs._new_state(q)), "step": step}
        native.native_step(q.data, gradient, theirs.state[q], theirs.param_groups[0], path=path)
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(ours.state[p][key], theirs.state[q][key]), key
    assert torch.equal(p, q)


def test_near_zero_the_second_moment_has_less_than_half_of_bitsandbytes_error():
    """One large value a block and others four to eight decades (of v) below it: relative error of the root."""
    generator = torch.Generator().manual_seed(0)
    root = 10 ** (-2 - 2 * torch.rand(64 * 256, generator=generator))
    root[::256] = 1.0
    codes, scales = slices.encode_root(root)
    ours = slices.decode_root(codes, scales)
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

    code = create_dynamic_map(signed=False)
    quantised, state = quantize_blockwise(root.square(), code=code, blocksize=256)
    theirs = dequantize_blockwise(quantised, state).sqrt()
    error = lambda decoded: ((decoded - root) / root).abs().mean()  # noqa: E731
    assert error(ours) < 0.5 * error(theirs)


def test_a_moment_of_zero_stays_zero_and_a_small_root_does_not_become_it(engine):
    optimizer, p = companded(torch.zeros(4096), lr=1.0, weight_decay=0.0)
    gradient = torch.zeros(4096)
    gradient[::256], gradient[1::256] = 1.0, 1e-7
    for _ in range(5):
        one_step(optimizer, p, gradient)
    assert (p[2::256] == 0).all()  # bitsandbytes' grid would let it drift
    assert (optimizer.state[p]["state2"][1::256] == 1).all()
    assert (p[1::256].abs() <= p[0].abs()).all()  # a root of 0 would have made a step of 1e-8 / eps


def test_computed_codes_resume_and_a_state_keeps_its_codes(engine):
    (straight, p), (resumed, q) = companded(torch.ones(TAIL)), pair(TAIL)[0]
    for step in (1, 2):
        one_step(straight, p, gradients("random", TAIL, step))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))  # into an optimizer that would begin with maps
    q.data.copy_(p.data)
    for optimizer, parameter in ((straight, p), (resumed, q)):
        one_step(optimizer, parameter, gradients("random", TAIL, 3))
    assert "qmap1" not in resumed.state[q] and torch.equal(p, q)
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(straight.state[p][key], resumed.state[q][key])


def test_a_residual_of_8_bits_is_right_on_average_and_hardly_ever_off(engine):
    """Weights of 1.0, steps of -1e-6: a 15th of the residual's own unit, a 256th of bf16's spacing of 2**-8."""
    optimizer, p = stochastic(torch.ones(400_000), lr=1e-6, rounding="residual8")
    for _ in range(10):
        one_step(optimizer, p, torch.ones(400_000).bfloat16())
    moved = 1 - slices.join(p.data, optimizer.state[p]["residual"]).double()
    assert optimizer.state[p]["residual"].dtype == torch.int8
    assert moved.mean().item() == pytest.approx(10e-6, rel=0.05)
    assert moved.abs().max() < 10e-6 + 10 * 2**-16  # at most a 256th of a spacing off in each step


def test_splitting_keeps_24_bits_and_its_rounding_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    masters = torch.randn(200_000, generator=generator)
    half, rest = slices.split8(masters, 7)
    error = (slices.join(half, rest).double() - masters.double()) / masters.double().abs()
    assert error.abs().max() < 2**-15 and abs(error.mean().item()) < 3 * 2**-16 / 200_000**0.5
    exact = slices.join(half, rest)
    again = slices.split8(exact, 8)  # what 24 bits hold is not rounded
    assert torch.equal(again[0], half) and torch.equal(again[1], rest)


@needs_compiler
@pytest.mark.parametrize("path", native.PATHS)
def test_both_engines_keep_the_same_8_bits(path):
    if native.PATHS.index(path) > native.PATHS.index(native.best_path()):
        pytest.skip(f"this processor has no {path}")
    optimizer, p = stochastic(torch.linspace(-2, 2, TAIL), lr=1e-3, rounding="residual8")
    state = {**optimizer._new_state(p), "step": 1}
    group, gradient = optimizer.param_groups[0], gradients("random", TAIL, 1)
    q, other = p.data.clone(), copy.deepcopy(state)
    native.native_step(p.data, gradient, state, group, noise_key=43, path=path)
    slices.slice_step(q, gradient, other, group, noise_key=43)
    ours, theirs = slices.join(p.data, state["residual"]), slices.join(q, other["residual"])
    assert (ours - theirs).abs().max() <= 2**-15 and (ours != theirs).double().mean() < 0.01


MEASURE_A_STEP = """
import resource, sys, torch
from grpo_ds.optim import CPUAdamW8bit, native
if sys.argv[1] == "slices": native.library = lambda: None
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
n = 48 * 1024 * 1024
small = torch.nn.Parameter(torch.zeros(1 << 20)); small.grad = torch.ones_like(small)
parameter = torch.nn.Parameter(torch.ones(n)); parameter.grad = torch.ones_like(parameter)
CPUAdamW8bit([small]).step()  # libraries, maps and threads are loaded now
optimizer = CPUAdamW8bit([parameter])
before = peak()
for _ in range(2): optimizer.step()
states = 2 * n + 2 * n // 256 * 4
print(peak() - before - states / 2**20)
"""


@pytest.mark.parametrize("kind", ["native", "slices"])
def test_a_step_needs_less_than_64_megabytes_besides_its_states(kind):
    if kind == "native" and native.library() is None:
        pytest.skip("no C++ compiler on this machine")
    done = subprocess.run([sys.executable, "-c", MEASURE_A_STEP, kind], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # bitsandbytes would take 960


def test_without_a_compiler_there_is_one_warning_and_the_step_works(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert native.library() is None
    assert len(caplog.messages) == 1 and "no C++ compiler" in caplog.messages[0] and "\n" not in caplog.messages[0]
    (ours, p), _ = pair(5000)
    one_step(ours, p, torch.ones(5000))


def test_a_compiler_that_fails_is_named_in_the_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert native.library.__wrapped__() is None
    assert "false failed" in caplog.messages[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "decay"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, named):
    with pytest.raises(UsageError, match=named):
        CPUAdamW8bit([torch.nn.Parameter(torch.zeros(1))], **settings)


def test_an_unsupported_dtype_is_refused_before_anything_changes():
    good, bad = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = CPUAdamW8bit([good, bad])
    good.grad, bad.grad = torch.ones(8), torch.ones(8, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"parameter 1 of group 0 is torch\.float64"):
        optimizer.step()
    assert torch.equal(good, torch.zeros(8))


def test_offloaded_moments_get_the_optimizer_for_ram():
    built = build_optimizer([torch.nn.Parameter(torch.zeros(4))], offload=True, **SETTINGS)
    assert isinstance(built, CPUAdamW8bit)
