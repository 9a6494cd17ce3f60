"""Numbers that are not finite: found before the step in every layout, and no weight moves."""

import json

import pytest
import torch

from grpo_ds.errors import MAX_LINES, NumbersError
from grpo_ds.models.policy import first_bad_weight
from grpo_ds.report.trackers import JsonLines
from grpo_ds.system import ranks
from grpo_ds.training.nonfinite import BAD_BATCH, NonfiniteSteps, refuse_bad_weights
from tests.training.layouts import LAYOUTS, assert_untouched, everything, make_engine, rollout_of, take_step
from tests.training.test_engine import run_ranks


def poison(parameter, value=torch.nan):
    """Spoil one element of this parameter's gradient in every backward until the hook is removed."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    return parameter.register_hook(spoil)


@pytest.mark.parametrize("pack_tokens", [0, 35])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_gradient_is_named_and_leaves_no_trace(tiny_folder, tmp_path, layout, pack_tokens):
    """The next step is the step that would have been taken without it, bit for bit."""
    rollout = rollout_of()
    spoiled, plain = (make_engine(tiny_folder, tmp_path, layout) for _ in range(2))
    for engine in (spoiled, plain):
        assert not take_step(engine, rollout, pack_tokens=pack_tokens).bad
    before = everything(spoiled)
    hook = poison(spoiled.model.model.layers[1].mlp.up_proj.weight)
    done = take_step(spoiled, rollout, pack_tokens=pack_tokens)
    hook.remove()
    assert done.bad == ["gradient (model.model.layers.1.mlp.up_proj.weight)"]
    assert done.tally.means()["bad_steps"] == 1
    assert_untouched(before, spoiled)
    if "offload" in layout:  # a parameter that a later step does not reach must not keep this gradient
        assert not any(master.grad.any() for master in spoiled._engine.optimizer.single_partition_of_fp32_groups)
    again, wanted = (take_step(engine, rollout, pack_tokens=pack_tokens) for engine in (spoiled, plain))
    assert not again.bad and again.tally.means() == wanted.tally.means()
    assert not torch.equal(before[0][0], next(plain.policy.parameters()))
    assert_untouched(everything(plain), spoiled)
    spoiled.close()
    plain.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_given_up_between_two_backwards_leaves_no_trace(tiny_folder, tmp_path, layout):
    rollout = rollout_of()
    given_up, plain = (make_engine(tiny_folder, tmp_path, layout) for _ in range(2))
    before = everything(given_up)
    (rows, _), *_ = rollout.micro_batches(35)
    given_up.backward(given_up(rows).sum(), last=False)
    given_up.abandon()
    assert_untouched(before, given_up)
    one, two = (take_step(engine, rollout, pack_tokens=35) for engine in (given_up, plain))
    assert one.tally.means() == two.tally.means()
    assert_untouched(everything(plain), given_up)
    given_up.close()
    plain.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norms_before_the_step_are_those_of_the_step(tiny_folder, tmp_path, layout):
    engine, norms = make_engine(tiny_folder, tmp_path, layout), {}
    measure = engine.gradient_norms
    engine.gradient_norms = lambda: norms.update(measure()) or norms
    done = take_step(engine, rollout_of())
    assert norms.keys() == dict(engine.policy.named_parameters()).keys()
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    if layout != "stage 0":  # DeepSpeed reports none there
        assert total == pytest.approx(done.tally.means()["grad_norm"], rel=1e-4)
    assert total > 0
    engine.close()


# How an update is spoiled, and what is found, the cause first; without a place if it concerns the whole step.
CAUSES = {
    "a reward": (lambda r: r.rewards.total.__setitem__(4, 1e300), ["reward (completion 2 of question q1)"]),
    "advantages": (
        lambda r: r.advantages[3:6].fill_(torch.nan),
        ["advantage (completion 1 of question q1 and 2 more)", "loss", "gradient"],
    ),
    "a reference log-prob": (  # its gradient is clamped to 0: only this check stops the step
        lambda r: r.ref_logprobs[7].fill_(torch.nan),
        ["reference log-prob (completion 2 of question q2)", "loss"],
    ),
    "an infinite one": (  # clamped before the loss, which is then finite
        lambda r: r.ref_logprobs[7].fill_(-torch.inf),
        ["reference log-prob (completion 2 of question q2)"],
    ),
}


@pytest.mark.parametrize("what", CAUSES)
def test_the_cause_is_named_before_its_consequences(tiny_folder, tmp_path, what):
    spoil, wanted = CAUSES[what]
    engine, rollout = make_engine(tiny_folder, tmp_path, "offload"), rollout_of()
    spoil(rollout)
    before = everything(engine)
    found = take_step(engine, rollout).bad
    assert found[0] == wanted[0] and [name.split(" (")[0] for name in found[1:]] == wanted[1:]
    assert_untouched(before, engine)
    engine.close()


def test_old_log_probs_and_weights_that_are_not_finite_are_told_apart(tiny_folder, tmp_path):
    engine, rollout = make_engine(tiny_folder, tmp_path, "offload"), rollout_of()
    old = torch.full(rollout.counted.shape, -5.0)
    old[2, 0] = torch.nan
    assert take_step(engine, rollout, old_logprobs=old).bad[0] == "old log-prob (completion 3 of question q0)"
    engine.model.model.norm.weight.data[5] = torch.inf
    assert take_step(engine, rollout).bad[0] == "log-prob (completion 1 of question q0 and 11 more)"
    assert first_bad_weight(engine.model) == "model.norm.weight"
    engine.close()


def test_a_gradient_too_large_to_square_is_a_bad_one(tiny_folder, tmp_path):
    """The optimizer's second moment would be infinite too: 1e20 is finite, its square is not in fp32."""
    engine = make_engine(tiny_folder, tmp_path, "offload")
    hook = poison(engine.model.model.norm.weight, 1e20)
    assert take_step(engine, rollout_of()).bad == ["gradient (model.model.norm.weight)"]
    hook.remove()
    engine.close()


def test_completions_that_do_not_count_may_have_any_advantage(tiny_folder, tmp_path):
    engine, rollout = make_engine(tiny_folder, tmp_path, "offload"), rollout_of()
    rollout.counted[3:6], rollout.advantages[3:6] = False, torch.nan
    assert not take_step(engine, rollout).bad
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_bad_weight_is_found_wherever_it_is(dtype, value):
    model = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Identity(), torch.nn.Linear(70, 9)).to(dtype)
    model[1].register_parameter("codes", torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    model[1].register_parameter("empty", torch.nn.Parameter(torch.zeros(0, dtype=dtype)))
    assert first_bad_weight(model) is None
    refuse_bad_weights(model)
    model[2].bias.data[-1] = value
    assert first_bad_weight(model) == "2.bias"
    model[0].weight.data[69, 299] = value
    with pytest.raises(NumbersError, match=r"its weight 0.weight is not finite"):
        refuse_bad_weights(model)


def counting_steps(limit, folder):
    said = []
    steps = NonfiniteSteps(limit, ranks.start(), said.append)
    steps.folder = folder
    return steps, said


def test_more_bad_steps_in_a_row_than_allowed_end_the_run_and_leave_the_batch(tmp_path):
    steps, said = counting_steps(1, tmp_path)
    rollout, bad = rollout_of(), ["reward (completion 2 of question q1)", "loss"]
    rollout.rewards.total[4], rollout.advantages[4], rollout.ref_logprobs[4, 0] = float("inf"), torch.nan, -torch.inf
    policy = torch.full(rollout.counted.shape, -2.0)
    for step, found in enumerate([bad, [], bad]):  # the good step between ends the row
        steps.record_step(found, step, rollout, policy=policy, old=None)
    assert not (tmp_path / BAD_BATCH).exists()
    with pytest.raises(NumbersError, match="steps 3 to 4: more than --max_bad_steps 1") as error:
        steps.record_step(bad, 3, rollout, policy=policy, old=None)
    assert error.value.exit_code == 6 and len(str(error.value).splitlines()) <= MAX_LINES
    assert "too large for fp32" in str(error.value) and str(tmp_path / BAD_BATCH) in str(error.value)
    assert [line.split(":")[0] for line in said] == [
        f"Step {step} is skipped ({count} in a row, of at most 1)" for step, count in ((1, 1), (3, 1), (4, 2))
    ]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    batch = json.loads((tmp_path / BAD_BATCH).read_text(), parse_constant=refuse)
    assert (batch["step"], batch["bad"], len(batch["completions"])) == (4, bad, 12)
    row = batch["completions"][4]
    assert (row["question"], row["completion"], row["text"], row["rank"]) == ("q1", 2, "text 4", 0)
    assert (row["reward"], row["advantage"], row["logprobs"]["reference"]["not_finite"]) == ("inf", "nan", 1)
    assert row["logprobs"]["policy"] == {"not_finite": 0, "lowest": -2.0, "mean": -2.0, "highest": -2.0}


def test_the_updates_of_one_rollout_are_one_bad_step():
    steps, said = counting_steps(1, None)
    for _ in range(4):
        steps.record_step(["loss"], 0, rollout_of(), policy=torch.zeros(12, 10), old=None)
    assert len(said) == 1
    with pytest.raises(NumbersError, match="no folder"):
        steps.record_step(["loss"], 1, rollout_of(), policy=torch.zeros(12, 10), old=None)


def test_metrics_that_are_not_finite_are_null_in_strict_json(tmp_path):
    JsonLines(tmp_path).log({"kl": float("nan"), "reward": float("-inf"), "loss": 0.5}, step=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "kl": None, "reward": None, "loss": 0.5}


@pytest.mark.parametrize("layout", ["offload", "offload, bf16 masters", "on the card", "stage 0"])
def test_what_one_rank_finds_every_rank_heeds(tiny_folder, tmp_path, layout):
    """In preflight and in a step, with unequal numbers of backwards; the run can continue."""
    run_ranks("number_ranks.py", tiny_folder, tmp_path, layout, ranks=2)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["preflight"] == ["", ""]
    assert "from autograd" in one["gradients"] and "top_k 20" in one["generation config"]
    assert one["bad"][0] == "reference log-prob (completion 3 of question q2)"
    assert len(one["lines"]) == 2 and "steps 1 to 2" in one["stopped"]
    rows = json.loads((tmp_path / BAD_BATCH).read_text())["completions"]
    assert [row["rank"] for row in rows] == [0] * 6 + [1] * 6 and rows[8]["logprobs"]["reference"]["not_finite"] == 1
    assert one["after"][0] == [] and (one["after"][1] > 0 or layout == "stage 0")
