"""The loss on numbers worked out by hand, and its independence of how a batch is split."""

import math

import pytest
import torch

from grpo_ds.core.losses import grpo_loss, kl_k3, token_weights


def batch(seed=0, sequences=8, length=5):
    g = torch.Generator().manual_seed(seed)
    policy, old, ref = (-torch.rand(sequences, length, generator=g) for _ in range(3))
    mask = torch.arange(length) < torch.randint(1, length + 1, (sequences, 1), generator=g)
    return policy, old, ref, torch.randn(sequences, generator=g), mask


def test_each_sequence_weighs_the_same_whatever_its_length():
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    weights = token_weights(mask, sequences=2)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0, 0, 0], [0.125] * 4]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.5, 1.0, -1.2, True),  # a good token already pushed far enough: held at 1 + epsilon
        (1.5, -1.0, 1.5, False),  # a bad token made likelier: full pull back
        (0.5, 1.0, -0.5, False),  # a good token made less likely: full push
        (0.5, -1.0, 0.8, True),  # a bad token already pushed down: held at 1 - epsilon
        (1.1, 2.0, -2.2, False),  # inside the trust region nothing is clipped
    ],
)
def test_the_surrogate_takes_the_pessimistic_branch(ratio, advantage, expected, clipped):
    policy = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    terms = grpo_loss(
        policy, torch.tensor([[-1.0]]), torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1),
        epsilon=0.2, beta=0.0,
    )  # fmt: skip
    assert terms.loss.item() == pytest.approx(expected, rel=1e-6)
    assert terms.clipped.item() is clipped
    terms.loss.backward()
    assert (policy.grad.abs().item() == 0) is clipped


def test_k3_by_hand():
    # d = ln 2: e^d - d - 1 = 1 - ln 2; d = -ln 2: 1/2 + ln 2 - 1
    policy, ref = torch.tensor([[0.0, 0.0, -1.0]]), torch.tensor([[math.log(2), -math.log(2), -1.0]])
    torch.testing.assert_close(kl_k3(policy, ref), torch.tensor([[1 - math.log(2), math.log(2) - 0.5, 0.0]]))


def test_k3_is_never_negative_and_never_overflows():
    policy = torch.tensor([[-1e4, 0.0, 1e-8]])
    values = kl_k3(policy, torch.tensor([[0.0, -1e4, 0.0]]))
    assert (values >= 0).all() and values.isfinite().all()


def test_the_gradient_is_the_textbook_policy_gradient_when_old_equals_new():
    policy, _, ref, advantages, mask = batch()
    policy.requires_grad_()
    weights = token_weights(mask, sequences=len(mask))
    grpo_loss(policy, policy.detach(), ref, advantages, weights, epsilon=0.2, beta=0.1).loss.backward()
    # d/dl of beta (e^(r-l) - (r-l) - 1) - A e^(l-l_old) = beta (1 - e^(r-l)) - A
    by_hand = weights * (0.1 * (1 - (ref - policy.detach()).exp()) - advantages[:, None])
    torch.testing.assert_close(policy.grad, by_hand)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_loss_does_not_depend_on_how_the_batch_is_split(parts):
    policy, old, ref, advantages, mask = batch()
    weights = token_weights(mask, sequences=len(mask))
    whole = grpo_loss(policy, old, ref, advantages, weights, epsilon=0.2, beta=0.04).loss
    split = sum(
        grpo_loss(*tensors, epsilon=0.2, beta=0.04).loss
        for tensors in zip(*(t.chunk(parts) for t in (policy, old, ref, advantages, weights)), strict=True)
    )
    torch.testing.assert_close(split, whole)


def test_masked_tokens_have_no_say():
    policy, old, ref, advantages, mask = batch()
    weights = token_weights(mask, sequences=len(mask))
    loss = grpo_loss(policy, old, ref, advantages, weights, epsilon=0.2, beta=0.04).loss
    policy[~mask], old[~mask], ref[~mask] = 7.0, -9.0, 3.0
    torch.testing.assert_close(grpo_loss(policy, old, ref, advantages, weights, epsilon=0.2, beta=0.04).loss, loss)
