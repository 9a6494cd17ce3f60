"""The expected reward against enumeration and sampling: the same mean and gradient, less variance.

A toy policy writes three tokens: a thought, an answer (yes, no or neither) and an end (closed or not). Its log-probs
are tables, so every completion there is can be listed with its probability.
"""

from itertools import product

import pytest
import torch

from grpo_ds.core.advantages import EPS, group_advantages, reward_spread
from grpo_ds.core.expected_reward import LabelProbs, expected_advantages, label_weights, reasoning_share, with_labels
from grpo_ds.core.losses import grpo_loss, token_weights
from grpo_ds.core.objective import Objective
from grpo_ds.core.pick import NOWHERE

THOUGHTS, YES, NO, NEITHER, CLOSED = 3, 0, 1, 2, 0
REWARD, FORMAT, GROUP = 2.0, 0.4, 2
EVERY = [torch.tensor(it) for it in product(range(THOUGHTS), (YES, NO, NEITHER), (CLOSED, 1))]
IDS = torch.tensor([YES, NO])


class Toy:
    """The tables, in fp64; yes is right."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        shapes = [THOUGHTS], [THOUGHTS, 3], [THOUGHTS, 2]
        self.tables = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]

    def logprobs(self, completions):
        """[B, 5]: of the three tokens, and of the two labels in place of the answer; 0 where it is neither."""
        thought, answer, end = completions.T
        first, second, third = (table.log_softmax(-1) for table in self.tables)
        own = torch.stack([first[thought], second[thought, answer], third[thought, end]], dim=1)
        return torch.cat([own, second[thought][:, IDS] * in_form(completions)[:, None]], dim=1)

    def labels(self, completions):
        probs = self.logprobs(completions)[:, 3:].softmax(dim=1).detach()
        places = torch.where(in_form(completions), 1, NOWHERE)
        return LabelProbs(places, IDS, probs * in_form(completions)[:, None], torch.zeros_like(places))


def in_form(completions):
    return (completions[:, 1] != NEITHER) & (completions[:, 2] == CLOSED)


def rewards_of(completions, labels=None):
    """Return all rewards and those for a right answer, drawn or expected."""
    right = in_form(completions) & (completions[:, 1] == YES)
    answers = REWARD * (right.double() if labels is None else labels.p_right)
    return answers + FORMAT * in_form(completions), answers


def gradient(toy, completions, *, expected, loss_type="grpo", scale="none", group_size=GROUP):
    """Gradient of minus the loss, one flat vector."""
    mask = torch.ones(len(completions), 3, dtype=torch.bool)
    sizes = {"sequences": len(completions), "tokens": int(mask.sum()), "max_completion_length": 3}
    weights = token_weights(mask, loss_type=loss_type, **sizes).double()
    policy, ref = toy.logprobs(completions), torch.zeros(len(completions), 3, dtype=torch.float64)
    options = {"group_size": group_size, "scale": scale}
    if expected:
        labels = toy.labels(completions)
        rewards, answers = rewards_of(completions, labels)
        advantages, of_labels = expected_advantages(rewards, answers, labels, reward=REWARD, **options)
        advantages = with_labels(advantages, of_labels, labels.places, 3)
        weights = torch.cat([weights, label_weights(weights, policy.detach()[:, 3:], labels.places)], dim=1)
    else:
        policy = policy[:, :3]
        advantages = group_advantages(rewards_of(completions)[0], **options)[:, None]
    objective = Objective(loss_type=loss_type, beta=0.0, max_completion_length=3)
    loss = grpo_loss(policy, policy.detach(), ref, advantages, weights, objective).loss
    return -torch.cat([part.flatten() for part in torch.autograd.grad(loss, toy.tables)])


def enumerated(toy, **options):
    """Mean and total variance of the gradient over every group that the toy can write."""
    groups = [torch.stack(pair) for pair in product(EVERY, repeat=GROUP)]
    chances = [float(toy.logprobs(group)[:, :3].sum().exp().detach()) for group in groups]
    assert sum(chances) == pytest.approx(1)
    gradients = torch.stack([gradient(toy, group, **options) for group in groups])
    mean = torch.einsum("g,gp->p", torch.tensor(chances, dtype=torch.float64), gradients)
    return mean, float(torch.tensor(chances, dtype=torch.float64) @ (gradients - mean).square().sum(dim=1))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_over_all_groups_the_mean_gradient_is_that_of_drawn_rewards_and_the_variance_is_less(loss_type):
    toy = Toy()
    drawn, noise = enumerated(toy, expected=False, loss_type=loss_type)
    expected, less_noise = enumerated(toy, expected=True, loss_type=loss_type)
    torch.testing.assert_close(expected, drawn, atol=1e-8, rtol=0)
    assert drawn.norm() > 0.01 and less_noise < 0.8 * noise


def test_the_mean_gradient_is_that_of_the_mean_reward():
    toy = Toy(seed=1)
    every = torch.stack(EVERY)
    mean_reward = toy.logprobs(every)[:, :3].sum(dim=1).exp() @ rewards_of(every)[0]
    exact = torch.cat([part.flatten() for part in torch.autograd.grad(mean_reward, toy.tables)])
    # dr_grpo weighs every token 1 / (2 completions * 3 tokens); a group's mean holds the completion itself: 1 - 1/G
    mean, _ = enumerated(toy, expected=True, loss_type="dr_grpo")
    torch.testing.assert_close(mean, exact * (1 - 1 / GROUP) / 3, atol=1e-8, rtol=0)


def test_a_hundred_thousand_drawn_answers_have_the_mean_the_variance_and_the_gradient_that_are_expected():
    toy, draws, g = Toy(seed=2), 100_000, torch.Generator().manual_seed(0)
    thoughts = torch.tensor([0, 1, 2, 1])
    yes = toy.tables[1].detach()[thoughts][:, :2].softmax(dim=1)[:, 0]
    answers = torch.where(torch.rand(draws, 4, generator=g) < yes, YES, NO)
    some = torch.stack([thoughts.expand(draws, 4), answers, torch.zeros_like(answers)], dim=2)  # [draws, 4, 3]
    labels = toy.labels(some[0])
    drawn = rewards_of(some.flatten(0, 1))[0].view(draws, 4)
    torch.testing.assert_close(drawn.mean(dim=0), rewards_of(some[0], labels)[0], atol=0.02, rtol=0)
    options = {"group_size": 4, "scale": "group", "hidden_variance": REWARD**2 * labels.variance}
    spread = reward_spread(rewards_of(some[0], labels)[0], **options) - EPS
    torch.testing.assert_close(drawn.var(dim=1).mean().sqrt().expand(4), spread, atol=0.01, rtol=0)
    groups, counts = some.unique(dim=0, return_counts=True)  # 16 groups
    gradients = torch.stack([gradient(toy, group, expected=False, group_size=4) for group in groups])
    mean = (counts[:, None] * gradients).sum(dim=0) / draws
    torch.testing.assert_close(mean, gradient(toy, some[0], expected=True, group_size=4), atol=2e-3, rtol=0)


def test_rewards_that_depend_on_the_label_reach_the_drawn_answer():
    labels = LabelProbs(torch.tensor([1, 1]), IDS, torch.tensor([[0.5, 0.5]] * 2), torch.tensor([0, 0]))
    rewards, answers = torch.tensor([1.3, 1.0]), torch.tensor([1.0, 1.0])  # the first earned 0.3 elsewhere
    advantages, extra = expected_advantages(rewards, answers, labels, reward=2.0, group_size=2, scale="none")
    torch.testing.assert_close(extra.drawn, torch.tensor([0.15, -0.15]))
    torch.testing.assert_close(extra.labels, torch.tensor([[0.5, -0.5], [0.5, -0.5]]))
    torch.testing.assert_close(
        with_labels(advantages, extra, labels.places, 3),
        torch.tensor([[0.15, 0.15, 0.15, 0.5, -0.5], [-0.15, -0.15, -0.15, 0.5, -0.5]]),
    )


def test_a_completion_without_a_place_keeps_its_drawn_reward_on_every_token():
    labels = LabelProbs(torch.tensor([2, NOWHERE]), IDS, torch.tensor([[0.25, 0.75], [0.0, 0.0]]), torch.tensor([0, 0]))
    rewards = torch.tensor([0.5 + 0.4, 0.0])
    options = {"reward": 2.0, "group_size": 2, "scale": "none"}
    advantages, extra = expected_advantages(rewards, torch.tensor([0.5, 0.0]), labels, **options)
    all_of_them = with_labels(advantages, extra, labels.places, 4)
    # Label yes: 2 against a mean of (2 + 0) / 2; label no: 0 against 0. The drawn token: 0.4 against a mean of 0.2.
    expected = [[0.45, 0.45, 0.2, 0.45, 1.0, 0.0], [-0.45, -0.45, -0.45, -0.45, 0.0, 0.0]]
    torch.testing.assert_close(all_of_them, torch.tensor(expected))
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    logprobs = torch.tensor([[0.2, 0.6], [0.0, 0.0]]).log().nan_to_num(neginf=0)
    torch.testing.assert_close(
        label_weights(weights, logprobs, labels.places), torch.tensor([[0.075, 0.225], [0.0, 0.0]])
    )


def test_the_share_of_the_reasoning_is_that_of_the_variance_between_thoughts():
    places, right = torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    q = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.7, 0.0])
    places[5] = NOWHERE
    labels = LabelProbs(places, IDS, torch.stack([q, 1 - q], dim=1), right)
    assert reasoning_share(labels, group_size=2).tolist() == [1.0, 0.0]  # the third group has one placed completion
