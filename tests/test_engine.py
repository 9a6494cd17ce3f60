"""Real ZeRO-2 offload: splitting a step over ranks or backwards changes nothing but memory."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_ds.core.losses import grpo_loss, token_weights
from tests.core.test_packing import alone
from tests.engine_steps import fixed_rollout

SCRIPT = Path(__file__).with_name("engine_steps.py")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="session")
def run_steps(tiny_folder, tmp_path_factory):
    """Steps in processes of their own, one a rank; each distinct run once a session."""
    done = {}

    def run(*, ranks=1, steps=1, micro_groups=0, mu=1):
        key = ranks, steps, micro_groups, mu
        if key not in done:
            out = tmp_path_factory.mktemp("steps") / "state.pt"
            rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
            command = [sys.executable, str(SCRIPT), str(tiny_folder), str(out), *map(str, (steps, micro_groups, mu))]
            root = str(SCRIPT.parents[1])
            workers = [
                subprocess.Popen(
                    command,
                    env={**os.environ, **rendezvous, "RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": root},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for r in range(ranks)
            ]
            outputs = [worker.communicate(timeout=300)[0] for worker in workers]
            assert [worker.returncode for worker in workers] == [0] * ranks, "\n".join(outputs)[-3000:]
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
    weights = token_weights(done.mask, sequences=12)
    terms = grpo_loss(
        logprobs, logprobs.detach(), rollout.ref_logprobs, rollout.advantages, weights, epsilon=0.2, beta=0.1
    )
    terms.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = run_steps()["history"][0]
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["loss"] == pytest.approx(float(terms.loss.detach()), abs=1e-5)


def test_two_ranks_take_the_same_step_as_one(run_steps):
    one, two = run_steps(ranks=1), run_steps(ranks=2)
    assert one["history"][0] == pytest.approx(two["history"][0], rel=1e-4, abs=1e-6)
    assert_same(one, two, atol=1e-5)


def test_a_split_batch_takes_the_same_step_as_a_whole_one(run_steps):
    one, split = run_steps(), run_steps(micro_groups=1)
    assert one["history"][0] == pytest.approx(split["history"][0], rel=1e-4, abs=1e-6)
    assert_same(one, split, atol=1e-5)


def test_the_step_changes_the_weights(run_steps, tiny_folder):
    from transformers import Qwen2ForCausalLM

    before = Qwen2ForCausalLM.from_pretrained(tiny_folder).state_dict()
    after = run_steps()["weights"]
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())


def test_later_updates_on_a_rollout_use_the_log_probs_before_the_first(run_steps):
    """With mu 2 the second ratio differs from 1, so the surrogate is no longer -mean(A) and loss falls."""
    once, twice = run_steps(steps=1, mu=1)["history"][0], run_steps(steps=1, mu=2)["history"][0]
    assert twice["loss"] < once["loss"]  # the mean of the first (equal) and a second, lower one
