"""Every objective against numbers worked out by hand; the loss does not depend on how a batch is split."""

import math
from typing import get_args

import pytest
import torch

from grpo_ds.core import losses, surrogates
from grpo_ds.core.losses import entropy_bonus, grpo_loss, kl_estimate, kl_k3, most_uncertain, token_weights
from grpo_ds.core.objective import KlEstimator, LossType, Objective
from grpo_ds.core.surrogates import cispo_surrogate, clipped_surrogate, sapo_surrogate, vespo_surrogate
from tests.conftest import load_unchecked

LOSS_TYPES, LN2 = get_args(LossType), math.log(2)
RATIOS = torch.tensor([[0.5, 1.1, 1.5], [0.5, 1.1, 1.5]])  # below, within and above 0.8 to 1.2
SIGNS = torch.tensor([[1.0], [-1.0]])  # advantages


def batch(seed=0, sequences=8, length=5):
    g = torch.Generator().manual_seed(seed)
    policy, old, ref = (-torch.rand(sequences, length, generator=g) for _ in range(3))
    mask = torch.arange(length) < torch.randint(1, length + 1, (sequences, 1), generator=g)
    return policy, old, ref, torch.randn(sequences, 1, generator=g), mask


def objective(loss_type="grpo", beta=0.0, **settings):
    return Objective(loss_type=loss_type, beta=beta, max_completion_length=5, **settings)


def weigh(mask, loss_type="grpo", length=5):
    sequences, tokens = int(mask.any(dim=1).sum()), int(mask.sum())
    return token_weights(mask, loss_type=loss_type, sequences=sequences, tokens=tokens, max_completion_length=length)


@pytest.mark.parametrize(
    ("loss_type", "one", "four"),
    [
        ("grpo", 1 / 2, 1 / 8),  # the same for each sequence, whatever its length
        ("gspo", 1 / 2, 1 / 8),
        ("sapo", 1 / 2, 1 / 8),
        ("luspo", 1 / 2, 1 / 2),  # a sequence counts by its length
        ("vespo", 1 / 5, 1 / 5),
        ("dapo", 1 / 5, 1 / 5),  # the same for each token
        ("cispo", 1 / 5, 1 / 5),
        ("bnpo", 1 / 5, 1 / 5),
        ("dr_grpo", 1 / 20, 1 / 20),  # 2 sequences of at most 10
    ],
)
def test_what_a_token_weighs(loss_type, one, four):
    # the third completion is masked, so there are two sequences
    mask = torch.tensor([[True, False, False, False], [True, True, True, True], [False] * 4])
    expected = torch.tensor([[one, 0, 0, 0], [four] * 4, [0.0] * 4])
    torch.testing.assert_close(weigh(mask, loss_type, length=10), expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_in_which_nothing_counts_has_a_loss_of_0(loss_type):
    policy, old, ref, advantages, mask = batch()
    weights = weigh(mask & False, loss_type)
    assert grpo_loss(policy, old, ref, advantages, weights, objective(loss_type, 0.1)).loss == 0


@pytest.mark.parametrize(
    ("settings", "ratio", "advantage", "expected", "flags", "slope"),
    [  # slope: d loss / d log policy; flags: low, high, clipped
        ({}, 1.5, 1.0, -1.2, (0, 1, 1), 0),  # a good token that is already likelier: clipped at 1 + epsilon
        ({}, 1.5, -1.0, 1.5, (0, 0, 0), 1.5),  # a bad token that became likelier: full gradient down
        ({}, 0.5, 1.0, -0.5, (0, 0, 0), -0.5),  # a good token that became less likely: full gradient up
        ({}, 0.5, -1.0, 0.8, (1, 0, 1), 0),  # a bad token that is already less likely: clipped at 1 - epsilon
        ({}, 1.1, 2.0, -2.2, (0, 0, 0), -2.2),  # inside the trust region nothing is clipped
        ({"epsilon_high": 0.28}, 1.25, 1.0, -1.25, (0, 0, 0), -1.25),  # clip-higher: not yet
        ({"epsilon_high": 0.28}, 1.5, 1.0, -1.28, (0, 1, 1), 0),
        ({"epsilon_high": 0.28}, 0.75, -1.0, 0.8, (1, 0, 1), 0),  # the lower bound is still 1 - epsilon
        ({"delta": 4.0}, 3.0, -1.0, 3.0, (0, 0, 0), 3.0),
        ({"delta": 4.0}, 8.0, -1.0, 4.0, (0, 0, 1), 0),  # beyond delta there is no gradient
        ({"delta": 4.0}, 8.0, 1.0, -1.2, (0, 1, 1), 0),  # with a positive advantage delta changes nothing
        # cispo: -min(ratio, 1 + epsilon_high) A log policy, log policy = ln ratio - 1; always a slope
        ({"loss_type": "cispo"}, 1.5, 1.0, 1.2 * (1 - math.log(1.5)), (0, 1, 1), -1.2),
        ({"loss_type": "cispo"}, 0.5, -1.0, -0.5 * (1 + LN2), (0, 0, 0), 0.5),
        ({"loss_type": "cispo", "epsilon_high": 4.0}, 3.0, 1.0, 3 * (1 - math.log(3)), (0, 0, 0), -3.0),
        # sapo: -4 A sigmoid(t (ratio - 1)) / t, slope in log policy -4 A ratio sigmoid (1 - sigmoid); A at ratio 1
        ({"loss_type": "sapo"}, 1.0, 1.0, -2.0, (0, 0, 0), -1.0),
        ({"loss_type": "sapo", "sapo_temperature_neg": 2.0}, 1.0, -1.0, 1.0, (0, 0, 0), 1.0),
        ({"loss_type": "sapo"}, 1 + LN2, 1.0, -4 * 2 / 3, (0, 0, 0), -4 * (1 + LN2) * 2 / 9),
        (
            {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
            1 + LN2,
            -1.0,
            2 * 4 / 5,
            (0, 0, 0),
            4 * (1 + LN2) * 4 / 25,
        ),
        # vespo: -phi A log policy with phi = ratio^k e^(lambda (1 - ratio)), here 2^2 e^-3 and 2^3 e^-2
        ({"loss_type": "vespo"}, 2.0, 1.0, -4 * math.exp(-3) * (LN2 - 1), (0, 0, 0), -4 * math.exp(-3)),
        ({"loss_type": "vespo"}, 2.0, -1.0, 8 * math.exp(-2) * (LN2 - 1), (0, 0, 0), 8 * math.exp(-2)),
        (
            {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0},
            0.5,
            1.0,
            -math.e / 2 * (-LN2 - 1),
            (0, 0, 0),
            -math.e / 2,
        ),
    ],
)
def test_the_surrogate_of_one_token(settings, ratio, advantage, expected, flags, slope):
    policy = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    terms = grpo_loss(
        policy, torch.tensor([[-1.0]]), torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1),
        objective(**settings),
    )  # fmt: skip
    assert terms.loss.item() == pytest.approx(expected, rel=1e-6)
    assert (terms.low.item(), terms.high.item(), terms.clipped.item()) == flags
    terms.loss.backward()
    assert policy.grad.item() == pytest.approx(slope, rel=1e-6)


def test_clipped_surrogates_by_hand():
    # A = 1: 0.5 and 1.1 stay as they are, 1.5 becomes 1.2. A = -1: 0.5 becomes -0.8, 1.1 and 1.5 stay.
    surrogate = clipped_surrogate(RATIOS, SIGNS, epsilon=0.2, epsilon_high=0.2)
    torch.testing.assert_close(surrogate.values, torch.tensor([[0.5, 1.1, 1.2], [-0.8, -1.1, -1.5]]))
    assert surrogate.low.tolist() == [[False] * 3, [True, False, False]]
    assert surrogate.high.tolist() == [[False, False, True], [False] * 3]
    assert not surrogate.beyond_delta.any()


def test_two_sided_clipping_also_bounds_a_negative_surrogate_by_hand():
    # As above, but for A = -1 the ratio 1.5 is held at delta = 1.4.
    surrogate = clipped_surrogate(RATIOS, SIGNS, epsilon=0.2, epsilon_high=0.2, delta=1.4)
    torch.testing.assert_close(surrogate.values, torch.tensor([[0.5, 1.1, 1.2], [-0.8, -1.1, -1.4]]))
    assert surrogate.low.tolist() == [[False] * 3, [True, False, False]]
    assert surrogate.high.tolist() == [[False, False, True], [False] * 3]
    assert surrogate.beyond_delta.tolist() == [[False] * 3, [False, False, True]]


def test_cispo_surrogates_and_their_gradients_by_hand():
    # log policy is -2. A = 1: -2 * 0.5, -2 * 1.1 and -2 * 1.2; A = -1 the opposite. The gradient is min(ratio, 1.2) A.
    policy_logprobs = torch.full((2, 3), -2.0, requires_grad=True)
    surrogate = cispo_surrogate(RATIOS, SIGNS, policy_logprobs, epsilon_high=0.2)
    torch.testing.assert_close(surrogate.values, torch.tensor([[-1.0, -2.2, -2.4], [1.0, 2.2, 2.4]]))
    assert surrogate.high.tolist() == [[False, False, True]] * 2
    assert not surrogate.low.any() and not surrogate.beyond_delta.any()
    (gradient,) = torch.autograd.grad(surrogate.values.sum(), policy_logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 1.1, 1.2], [-0.5, -1.1, -1.2]]))


def test_the_gate_of_sapo_closes_sooner_for_negative_advantages_by_hand():
    # at ratio 1 + ln 2 / t the sigmoid is 2/3: 4 / t * 2/3 A; at 1 it is 1/2
    ratio = torch.tensor([[1.0, 1 + LN2], [1.0, 1 + LN2 / 2]])
    surrogate = sapo_surrogate(ratio, SIGNS, temperature_pos=1.0, temperature_neg=2.0)
    torch.testing.assert_close(surrogate.values, torch.tensor([[2.0, 8 / 3], [-1.0, -4 / 3]]))
    assert not (surrogate.low | surrogate.high | surrogate.beyond_delta).any()


def test_vespo_weighs_by_the_product_of_a_sequences_ratios_by_hand():
    # Log-ratios ln 2, ln 2 and a masked 9: w = 4, phi = 4^2 e^-9 if A >= 0. The second sequence: w = 1/2 with A = -1,
    # phi = e / 8. log policy is -2, and phi has no gradient.
    ratio = torch.tensor([[2.0, 2.0, math.e**9], [0.5, 1.0, 1.0]], requires_grad=True)
    policy_logprobs = torch.full((2, 3), -2.0, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True] * 3])
    surrogate = vespo_surrogate(ratio, SIGNS, policy_logprobs, mask, pos=(2.0, 3.0), neg=(3.0, 2.0))
    phi = torch.tensor([[16 * math.exp(-9)], [math.e / 8]])
    torch.testing.assert_close(surrogate.values, (-2 * phi * SIGNS).expand(2, 3))
    slope, none = torch.autograd.grad(surrogate.values.sum(), (policy_logprobs, ratio), allow_unused=True)
    torch.testing.assert_close(slope, (phi * SIGNS).expand(2, 3))
    assert none is None


def test_a_sequence_far_from_its_old_policy_has_no_weight_and_no_overflow_under_vespo():
    ratio = torch.tensor([[math.exp(20.0)] * 5, [math.exp(-20.0)] * 5])
    mask = torch.ones(2, 5, dtype=torch.bool)
    values = vespo_surrogate(ratio, SIGNS, torch.full((2, 5), -1.0), mask, pos=(2.0, 3.0), neg=(3.0, 2.0)).values
    torch.testing.assert_close(values, torch.zeros(2, 5), atol=1e-20, rtol=0)  # 1e-8^3 e^2 = 7e-24


def test_luspo_sums_a_sequence_where_gspo_takes_its_mean():
    policy, old, ref, advantages, mask = batch()
    lengths = mask.sum(dim=1, keepdim=True)
    sums, means = (
        grpo_loss(policy, old, ref, advantages * scale, weigh(mask, kind), objective(kind)).loss
        for kind, scale in (("luspo", 1), ("gspo", lengths))
    )
    torch.testing.assert_close(sums, means)


def test_an_unknown_loss_type_is_refused_by_everything_that_depends_on_it():
    unchecked = load_unchecked(losses)
    policy, old, ref, advantages, mask = batch()
    unknown = objective()
    object.__setattr__(unknown, "loss_type", "ppo")
    message = r"loss_type is 'ppo'; it must be one of grpo, dapo, dr_grpo, bnpo, gspo, cispo, sapo, luspo, vespo\."
    with pytest.raises(ValueError, match=message):
        unchecked.token_weights(mask, loss_type="ppo", sequences=8, tokens=20, max_completion_length=5)
    with pytest.raises(ValueError, match=message):
        unchecked.importance_ratio(policy, old, mask, loss_type="ppo")
    with pytest.raises(ValueError, match=message):
        load_unchecked(surrogates).choose_surrogate(policy, advantages, policy, mask, unknown)
    with pytest.raises(ValueError, match=message):
        unchecked.grpo_loss(policy, old, ref, advantages, weigh(mask), unknown)


def test_an_unknown_kl_estimator_is_refused():
    unchecked = load_unchecked(losses)
    policy, _, ref, _, _ = batch()
    with pytest.raises(ValueError, match=r"kl_estimator is 'k4'; it must be one of k1, k2, k3, k3_corrected\."):
        unchecked.kl_estimate(policy, ref, policy, estimator="k4")


def test_gspo_has_one_ratio_a_sequence_by_hand():
    # Log-ratios ln 2, 0 and a masked 9: their mean over two tokens is ln 2 / 2, the ratio sqrt 2. With advantage -1
    # it is not clipped: the loss is sqrt 2, and each of the two tokens has half of its slope. The ratio of the second
    # sequence is 4, with advantage 1: clipped at 1.2, no slope.
    log_ratios = torch.tensor([[LN2, 0.0, 9.0], [math.log(4)] * 3])
    mask = torch.tensor([[True, True, False], [True] * 3])
    old = torch.full((2, 3), -10.0)
    policy = (old + log_ratios).requires_grad_()
    terms = grpo_loss(policy, old, old, torch.tensor([[-1.0], [1.0]]), weigh(mask, "gspo"), objective("gspo"))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx((math.sqrt(2) - 1.2) / 2, rel=1e-5)
    slope = math.sqrt(2) / 2 / 2
    torch.testing.assert_close(policy.grad, torch.tensor([[slope, slope, 0.0], [0.0] * 3]))
    assert terms.high.tolist() == [[False] * 3, [True] * 3]


def test_the_entropy_bonus_is_a_share_of_the_steps_mean_by_hand():
    # 0.1 (1 + 3) / 8, with 8 tokens in the step; each counted entropy has the slope 0.1 / 8
    entropies = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    chosen = torch.tensor([[True, False], [True, False]])
    bonus = entropy_bonus(entropies, chosen, objective(entropy_coef=0.1), tokens=8)
    assert bonus.item() == pytest.approx(0.05)
    (slope,) = torch.autograd.grad(bonus, entropies)
    torch.testing.assert_close(slope, 0.0125 * chosen)
    assert entropy_bonus(entropies, chosen, objective(), tokens=8) == 0
    assert entropy_bonus(entropies, chosen & False, objective(entropy_coef=0.1), tokens=0) == 0


@pytest.mark.parametrize(
    ("share", "expected"),  # of the step's 1, 2, 3, 4, 5: quantiles 5, 4, 3 and 1
    [(0.0, [False, False]), (0.25, [False, True]), (0.5, [True, True]), (1.0, [True, True])],
)
def test_the_most_uncertain_tokens_are_those_of_the_step_by_hand(share, expected):
    entropies, counted = torch.tensor([[3.0, 4.0, 9.0]]), torch.tensor([[True, True, False]])
    of_step = torch.tensor([5.0, 3.0, 1.0, 4.0, 2.0])
    chosen = most_uncertain(entropies, counted, share=share, step_entropies=of_step)
    assert chosen.tolist() == [[*expected, False]]


def test_a_token_without_a_surrogate_keeps_its_kl_and_its_say_in_the_ratio_of_its_sequence():
    # ratio of the sequence sqrt 2, advantage -1: the first token alone weighs 1/2 of sqrt 2. k2: ln(2)^2 / 2 and 0,
    # weighed 0.1 / 2 each.
    old = torch.full((1, 2), -1.0)
    policy = (old + torch.tensor([[LN2, 0.0]])).requires_grad_()
    weights = weigh(torch.tensor([[True, True]]), "gspo")
    chosen = objective("gspo", 0.1, kl_estimator="k2")
    some = weights * torch.tensor([[True, False]])
    terms = grpo_loss(policy, old, old, torch.tensor([[-1.0]]), some, chosen, kl_weights=weights)
    assert terms.loss.item() == pytest.approx(math.sqrt(2) / 2 + 0.05 * LN2**2 / 2, rel=1e-5)
    terms.loss.backward()
    slope = math.sqrt(2) / 4  # half of the weight, shared by the two tokens of the ratio
    torch.testing.assert_close(policy.grad, torch.tensor([[slope + 0.05 * LN2, slope]]))


@pytest.mark.parametrize(
    ("estimator", "expected"),  # at d = ln 2, -ln 2 and 0, with a ratio of 3
    [
        ("k1", [-LN2, LN2, 0.0]),
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [1 - LN2, LN2 - 0.5, 0.0]),  # 2 - ln 2 - 1; 1/2 + ln 2 - 1
        ("k3_corrected", [3 * (1 - LN2), 3 * (LN2 - 0.5), 0.0]),
    ],
)
def test_kl_estimates_by_hand(estimator, expected):
    policy, ref = torch.tensor([[0.0, 0.0, -1.0]]), torch.tensor([[LN2, -LN2, -1.0]])
    values = kl_estimate(policy, ref, torch.full((1, 3), 3.0), estimator=estimator)
    torch.testing.assert_close(values, torch.tensor([expected]))


def test_k3_is_never_negative_and_never_overflows():
    policy = torch.tensor([[-1e4, 0.0, 1e-8]])
    values = kl_k3(policy, torch.tensor([[0.0, -1e4, 0.0]]))
    assert (values >= 0).all() and values.isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "slope"),  # of the KL term, with d = ref - policy and old = policy
    [
        ("k1", lambda d: torch.ones_like(d)),
        ("k2", lambda d: -d),
        ("k3", lambda d: 1 - d.exp()),
        ("k3_corrected", lambda d: -d),  # 1 - e^d from k3, plus e^d - d - 1 from the ratio
    ],
)
def test_the_gradient_is_the_textbook_policy_gradient_when_old_equals_new(estimator, slope):
    policy, _, ref, advantages, mask = batch()
    policy.requires_grad_()
    weights = weigh(mask)
    chosen = objective(beta=0.1, kl_estimator=estimator)
    grpo_loss(policy, policy.detach(), ref, advantages, weights, chosen).loss.backward()
    by_hand = weights * (0.1 * slope(ref - policy.detach()) - advantages)
    torch.testing.assert_close(policy.grad, by_hand)


def test_the_gradients_of_k2_and_corrected_k3_are_that_of_the_true_kl_in_expectation():
    """Expectation over a vocabulary of 4 tokens, weighted by the policy; k3's gradient differs, and k1's is 0."""
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.5, 0.2, 0.4, 1.0], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)

    def expected(estimator):
        fresh = logits.log_softmax(0)
        ratio = (fresh - fresh.detach()).exp()
        values = kl_estimate(fresh[None], ref[None], ratio[None], estimator=estimator)[0]
        return torch.autograd.grad((fresh.detach().exp() * values).sum(), logits)[0]

    for estimator in get_args(KlEstimator):
        exact = estimator in ("k2", "k3_corrected")
        assert torch.allclose(expected(estimator), true, atol=1e-12) is exact, estimator
    torch.testing.assert_close(expected("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("parts", [2, 8])
def test_the_loss_does_not_depend_on_how_the_batch_is_split(loss_type, parts):
    policy, old, ref, advantages, mask = batch()
    weights, chosen = weigh(mask, loss_type), objective(loss_type, 0.04)
    at_once = grpo_loss(policy, old, ref, advantages, weights, chosen).loss
    split = sum(
        grpo_loss(*tensors, chosen).loss
        for tensors in zip(*(t.chunk(parts) for t in (policy, old, ref, advantages, weights)), strict=True)
    )
    torch.testing.assert_close(split, at_once)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_tokens_have_no_say(loss_type):
    policy, old, ref, advantages, mask = batch()
    weights, chosen = weigh(mask, loss_type), objective(loss_type, 0.04, kl_estimator="k3_corrected")
    loss = grpo_loss(policy, old, ref, advantages, weights, chosen).loss
    policy[~mask], old[~mask], ref[~mask] = 7.0, -9.0, 3.0
    torch.testing.assert_close(grpo_loss(policy, old, ref, advantages, weights, chosen).loss, loss)
