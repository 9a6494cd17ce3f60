"""Real ZeRO-2 offload: splitting a step over ranks or backwards changes memory only."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.pick import NOWHERE
from tests.core.test_packing import alone
from tests.training.engine_losses import OBJECTIVES, TRUNCATED, objective_of
from tests.training.engine_steps import OBJECTIVE, fixed_rollout


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(script: str, *arguments: object, ranks: int) -> None:
    """Run a script in one process for each rank, as a launcher starts them."""
    file = Path(__file__).with_name(script)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(file), *map(str, arguments)],
            env={**os.environ, **rendezvous, "RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": str(file.parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(ranks)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * ranks, "\n".join(outputs)[-3000:]


@pytest.fixture(scope="session")
def run_steps(tiny_folder, tmp_path_factory):
    """Run each distinct case once a session."""
    done = {}

    def run(*, ranks=1, steps=1, pack_tokens=0, mu=1, rehearse=0, flat=0, lora_r=0, expected=0):
        key = ranks, steps, pack_tokens, mu, rehearse, flat, lora_r, expected
        if key not in done:
            out = tmp_path_factory.mktemp("steps") / "state.pt"
            run_ranks("engine_steps.py", tiny_folder, out, *key[1:], ranks=ranks)
            done[key] = torch.load(out, weights_only=True)
        return done[key]

    return run


def assert_same(one, two, *, atol):
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_engine_takes_the_step_that_plain_autograd_says(run_steps, tiny_folder):
    """The gradient norm through DeepSpeed equals that of the textbook loss, completion by completion."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(tiny_folder)
    rollout = fixed_rollout(slice(0, 4))
    done = rollout.completions
    logprobs = alone(model, rollout.prompts, done.ids, done.mask, 259)
    weights = token_weights(done.mask, loss_type="grpo", sequences=12, tokens=0, max_completion_length=0)
    terms = grpo_loss(logprobs, logprobs.detach(), rollout.ref_logprobs, rollout.all_advantages(), weights, OBJECTIVE)
    terms.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = run_steps()["history"][0]
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["loss"] == pytest.approx(float(terms.loss.detach()), abs=1e-5)
    assert 0 < first["entropy"] < math.log(259)


def test_the_engine_takes_the_step_of_an_expected_reward_that_plain_autograd_says(run_steps, tiny_folder):
    """Each token by its advantage, and at the answer each label by its own, weighted by its probability."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(tiny_folder)
    rollout = fixed_rollout(slice(0, 4), expected=True)
    done, labels, extra = rollout.completions, rollout.labels, rollout.of_labels
    loss = torch.zeros(())
    for b, length in enumerate(done.mask.sum(dim=1).tolist()):
        prompt, ids = rollout.prompts[b // 3], done.ids[b, :length]
        logits = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1, :259]
        logprobs, place = logits.log_softmax(dim=-1), int(labels.places[b])
        advantages = rollout.advantages[b].repeat(length)
        if place != NOWHERE:
            advantages[place] = extra.drawn[b]
            policy = logprobs[place, labels.ids]
            terms = policy.softmax(dim=0).detach() * (policy - policy.detach()).exp() * extra.labels[b]
            loss -= terms.sum() / length / 12
        policy = logprobs[torch.arange(length), ids]
        d = rollout.ref_logprobs[b, :length] - policy
        kl, ratio = d.exp() - d - 1, (policy - policy.detach()).exp()
        loss += (OBJECTIVE.beta * kl - ratio * advantages).mean() / 12
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = run_steps(expected=1)["history"][0]
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert first["grad_norm"] != pytest.approx(run_steps()["history"][0]["grad_norm"], rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_r": 4}, {"expected": 1}, {"expected": 1, "lora_r": 4}, {"expected": 1, "mu": 2}],
    ids=str,
)
def test_two_ranks_take_the_same_step_as_one(run_steps, settings):  # an adapter's first weights are the first rank's
    one, two = run_steps(ranks=1, **settings), run_steps(ranks=2, **settings)
    assert one["history"][0] == pytest.approx(two["history"][0], rel=1e-4, abs=1e-6)
    assert_same(one, two, atol=1e-5)


@pytest.fixture(scope="module")
def every_loss(tiny_folder, tmp_path_factory):
    """One step with every objective on 1 and on 2 ranks; completions of uneven length, some not counted."""
    done = {}
    for ranks, pack_tokens in ((1, 74), (2, 74), (1, 0)):  # 74: two groups a backward, which bnpo needs too
        out = tmp_path_factory.mktemp("losses") / "state.pt"
        run_ranks("engine_losses.py", tiny_folder, out, pack_tokens, ranks=ranks)
        done[ranks if pack_tokens else "whole"] = torch.load(out, weights_only=True)
    return done


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_take_the_same_step_as_one_with_every_objective(every_loss, name):
    one, two = (every_loss[ranks][name] for ranks in (1, 2))
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4, abs=1e-6)
    assert_same(one, two, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "bnpo"])  # a mean over micro-batches
def test_a_split_batch_takes_the_same_step_as_a_whole_one_with_every_objective(every_loss, name):
    split, whole = (every_loss[way][name] for way in (1, "whole"))
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)
    assert_same(split, whole, atol=1e-5)


@pytest.mark.parametrize("name", ["entropy_coef", "top_entropy_quantile", "both without a KL"])
@pytest.mark.parametrize("way", [1, 2, "whole"])
def test_entropies_have_the_gradient_that_plain_autograd_says(every_loss, tiny_folder, name, way):
    """Full logits of one completion after another: no packed rows, no chunks, no backwards, no ranks."""
    from transformers import Qwen2ForCausalLM

    model, objective = Qwen2ForCausalLM.from_pretrained(tiny_folder), objective_of(OBJECTIVES[name])
    rollout = fixed_rollout(slice(0, 4), truncated=TRUNCATED)
    losses, entropies = [], []
    for b in rollout.counted.any(dim=1).nonzero().flatten().tolist():
        ids, prompt = rollout.completions.ids[b][rollout.counted[b]], rollout.prompts[b // 3]
        logprobs = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1, :259].log_softmax(dim=-1)
        policy, ref = logprobs[torch.arange(len(ids)), ids], rollout.ref_logprobs[b, : len(ids)]
        ratio, d, a = (policy - ref).exp(), ref - policy, rollout.advantages[b]
        surrogate = torch.minimum(ratio.clamp(max=1.5) * a, ratio.clamp(0.8, 1.2) * a)
        losses.append(torch.stack([-surrogate, objective.beta * ratio * (d.exp() - d - 1)]) / len(ids) / 8)
        entropies.append(-(logprobs.exp() * logprobs).sum(dim=-1))
    (surrogates, kl), entropies = torch.cat(losses, dim=1), torch.cat(entropies)
    chosen = entropies >= entropies.detach().quantile(1 - objective.top_entropy_quantile)
    loss = surrogates[chosen].sum() + kl.sum() - objective.entropy_coef * entropies[chosen].mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    metrics = every_loss[way][name]["metrics"]
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert metrics["entropy"] == pytest.approx(float(entropies.detach().mean()), rel=1e-5)


def test_ranks_that_draw_different_numbers_of_times_train_together(tiny_folder, tmp_path):
    run_ranks("trainer_ranks.py", tiny_folder, tmp_path, ranks=2)
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["redrawn"] == 3  # three times two groups on rank 0, none on rank 1
        assert line["frac_reward_zero_std"] == 0.5
        assert line["reward"] == pytest.approx(1.75)  # 0 and the mean of 0 to 7
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["weights"], two["weights"])
    # Rewards of the batch: eight times 0, and 0 to 7; mean 1.75, squares 140 - 16 x 1.75^2 = 91, over 15.
    assert not one["advantages"].any()
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5] * 2) / ((91 / 15) ** 0.5 + 1e-4)
    torch.testing.assert_close(two["advantages"], expected)


def test_objectives_differ(every_loss):
    norms = {round(run["metrics"]["grad_norm"], 5) for run in every_loss[1].values()}
    assert len(norms) == len(OBJECTIVES)
    assert every_loss[1]["grpo"]["metrics"]["clip_ratio/region_mean"] > 0.1  # else the ratios are not tested


@pytest.mark.parametrize("expected", [0, 1])
def test_a_split_batch_takes_the_same_step_as_a_whole_one(run_steps, expected):
    one, split = run_steps(expected=expected), run_steps(pack_tokens=35, expected=expected)
    assert one["history"][0] == pytest.approx(split["history"][0], rel=1e-4, abs=1e-6)
    assert_same(one, split, atol=1e-5)


def test_ranks_with_more_and_fewer_backwards_take_the_same_step(run_steps):
    one, two = run_steps(), run_steps(ranks=2, pack_tokens=35)
    assert one["history"][0] == pytest.approx(two["history"][0], rel=1e-4, abs=1e-6)
    assert_same(one, two, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_of_equal_rewards_are_left_out_without_a_kl_and_count_all_the_same(run_steps, tiny_folder, ranks):
    """Three of four groups: one rank of two has nothing to compute and joins the other's backward."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(tiny_folder)
    rollout = fixed_rollout(slice(0, 4), flat=3)
    done = rollout.completions
    logprobs = alone(model, rollout.prompts, done.ids, done.mask, 259)
    weights = token_weights(done.mask, loss_type="grpo", sequences=12, tokens=0, max_completion_length=0)
    without_kl = replace(OBJECTIVE, beta=0.0)
    terms = grpo_loss(logprobs, logprobs.detach(), logprobs, rollout.all_advantages(), weights, without_kl)
    terms.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert run_steps(ranks=ranks, flat=3)["history"][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_where_every_group_is_left_out_nothing_moves(run_steps, tiny_folder):
    """Neither momentum of earlier steps nor weight decay may move them."""
    before, after = run_steps(), run_steps(flat=4)
    assert_same(before, after, atol=0)


def test_the_step_changes_the_weights(run_steps, tiny_folder):
    from transformers import Qwen2ForCausalLM

    before = Qwen2ForCausalLM.from_pretrained(tiny_folder).state_dict()
    after = run_steps()["weights"]
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("pack_tokens", [0, 35])
def test_a_rehearsal_leaves_no_trace(run_steps, pack_tokens):
    plain, rehearsed = (run_steps(steps=2, pack_tokens=pack_tokens, rehearse=r) for r in (0, 1))
    assert plain["history"] == rehearsed["history"]
    assert_same(plain, rehearsed, atol=0)


def test_later_updates_with_an_expected_reward_move_on_and_are_clipped(run_steps):
    once, twice = run_steps(expected=1), run_steps(expected=1, mu=2)
    assert twice["history"][0]["clip_ratio/region_mean"] > once["history"][0]["clip_ratio/region_mean"] == 0
    assert not torch.equal(*(run["weights"]["model.norm.weight"] for run in (once, twice)))


def test_later_updates_on_a_rollout_use_the_log_probs_before_the_first(run_steps):
    """With mu 2 the second ratio differs from 1, so the surrogate is no longer -mean(A) and loss falls."""
    once, twice = run_steps(steps=1, mu=1)["history"][0], run_steps(steps=1, mu=2)["history"][0]
    assert twice["loss"] < once["loss"]  # the mean of the first (equal) and a second, lower one


@pytest.fixture(scope="module", params=[(1, 50), (2, 8)], ids=["one rank", "two ranks"])
def masters(request, tmp_path_factory):
    """For each way to keep the masters: fp32 values and weights of every rank, uninterrupted and resumed half-way."""
    ranks, steps = request.param
    folder = tmp_path_factory.mktemp("masters")
    run_ranks("engine_masters.py", folder, steps, ranks=ranks)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def test_smaller_masters_take_the_same_steps_bit_by_bit(masters):
    """The shared staging buffer, and bf16 masters with residual, against fp32 masters with a buffer of their own."""
    for rank in masters:
        wanted = rank["own staging"]["straight"]
        for mode in ("shared staging", "residual"):
            assert torch.equal(rank[mode]["straight"]["masters"], wanted["masters"])
            # ZeRO rounds ties of fp32 to even, the split away from zero: one weight in 65,536 may differ by a bit
            different = rank[mode]["straight"]["weights"] != wanted["weights"]
            assert different.double().mean() < 1e-3


def test_flattened_and_cloned_in_ram_as_for_a_card_they_are_the_same_bit_by_bit(masters):
    for rank in masters:
        for part, wanted in rank["shared staging"]["straight"].items():
            assert torch.equal(rank["weights once"]["straight"][part], wanted)


def test_stochastic_masters_stay_near_and_differ(masters):
    for rank in masters:
        exact, rounded = (rank[mode]["straight"]["masters"] for mode in ("own staging", "stochastic"))
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).mean().abs() < 2e-6  # no drift: the spacing of bf16 is 1e-4 at 0.02
        assert (exact - rounded).abs().max() < 2e-3


def test_masters_of_24_bits_and_computed_moments_stay_nearer(masters):
    for rank in masters:
        exact = rank["own staging"]["straight"]["masters"]
        for mode, most in (("residual8", 2e-5), ("companded", 5e-5)):
            near = rank[mode]["straight"]["masters"]
            assert not torch.equal(exact, near)
            assert (exact - near).abs().max() < most, mode  # they have moved by up to 50 steps of 1e-5


def test_a_deepspeed_checkpoint_carries_every_kind_of_master_on(masters):
    for rank in masters:
        for mode, states in rank.items():
            for what, tensor in states["straight"].items():
                assert torch.equal(tensor, states["resumed"][what]), f"{mode}: {what}"


def test_an_unknown_deepspeed_is_refused_before_anything_is_replaced():
    from types import SimpleNamespace

    from grpo_ds.errors import GrpoError
    from grpo_ds.training.zero_staging import _check_insides

    with pytest.raises(GrpoError, match=r"pip install deepspeed=="):
        _check_insides(SimpleNamespace(optimizer=SimpleNamespace()), "0.20.0", bf16_masters=False)


def test_a_lock_that_a_killed_run_left_keeps_nobody_waiting():
    """DeepSpeed would compile an operation under this lock that is never called here."""
    from deepspeed.comm.torch import build_shm_op

    import grpo_ds.training.engine  # noqa: F401

    assert build_shm_op() is None
