"""Our loss against TRL's on the same tensors, in value and gradient."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from grpo_ds.core.losses import entropy_bonus, grpo_loss, most_uncertain
from grpo_ds.core.objective import Objective
from grpo_ds.settings.grpo_flags import SAPO, VESPO
from grpo_ds.system.ranks import World
from grpo_ds.training.update import step_weights
from tests.core.test_losses import LOSS_TYPES, batch, weigh

pytestmark = pytest.mark.peer("trl")
LONGEST = 7


def trl_loss(policy, old, ref, advantages, mask, objective, *, entropies=None, accumulation=1, tokens=None):
    """Call TRL's real method for one micro-batch, on an object with only the attributes that it reads."""
    from trl import GRPOTrainer

    gspo, cispo = objective.loss_type == "gspo", objective.loss_type == "cispo"
    entropies = torch.zeros_like(policy) if entropies is None else entropies
    of_sequence = gspo or objective.loss_type == "luspo"
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, entropies, None),
        loss_type="grpo" if gspo else objective.loss_type,
        importance_sampling_level="sequence" if of_sequence else "token",
        epsilon_low=objective.epsilon,
        # TRL's bound for cispo is epsilon_high itself (as in ScaleRL), ours is 1 + epsilon_high (as in MiniMax-M1).
        epsilon_high=objective.epsilon_high + cispo,
        beta=objective.beta,
        max_completion_length=objective.max_completion_length,
        args=SimpleNamespace(
            delta=objective.delta,
            use_bias_correction_kl=objective.kl_estimator == "k3_corrected",
            steps_per_generation=accumulation,
            **{flag: getattr(objective, flag) for flag in (*SAPO, *VESPO)},
        ),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        current_gradient_accumulation_steps=accumulation,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, reduce=lambda t, **_: t, gather=lambda t: t,
            pad_across_processes=lambda t, **_: t,
        ),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, off_policy_mask_threshold=None, use_vllm=False,
        top_entropy_quantile=objective.top_entropy_quantile, entropy_coef=objective.entropy_coef,
        _entropy_bonus_enabled=objective.entropy_coef != 0, use_adaptive_entropy=False,
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages.squeeze(1), "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": torch.tensor(tokens or int(mask.sum())),
    }  # fmt: skip
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epsilon": 0.1, "epsilon_high": 0.4},
        {"delta": 1.5},
        {"beta": 0.3},
        {"beta": 0.3, "kl_estimator": "k3_corrected"},
        {
            "sapo_temperature_pos": 0.5,
            "sapo_temperature_neg": 2.0,
            "vespo_k_pos": 0.5,
            "vespo_lambda_pos": 1.0,
            "vespo_k_neg": 1.5,
            "vespo_lambda_neg": 0.5,
        },
    ],
    ids=str,
)
def test_the_loss_and_its_gradient_are_trls(loss_type, settings):
    policy, old, ref, advantages, mask = batch()
    policy.requires_grad_()
    objective = Objective(**{"loss_type": loss_type, "beta": 0.0, **settings}, max_completion_length=LONGEST)
    terms = grpo_loss(policy, old, ref, advantages, weigh(mask, loss_type, LONGEST), objective)
    theirs, metrics = trl_loss(policy, old, ref, advantages, mask, objective)
    torch.testing.assert_close(terms.loss, theirs)
    ours_grad, their_grad = (torch.autograd.grad(loss, policy)[0] for loss in (terms.loss, theirs))
    torch.testing.assert_close(ours_grad, their_grad)
    assert ours_grad.abs().sum() > 0
    if objective.beta:
        assert float(terms.kl.sum() / mask.sum()) == pytest.approx(metrics["kl"], rel=1e-5)
    # TRL counts sequences (gspo, luspo) and only tokens of positive advantage (cispo); sapo and vespo clip nothing.
    if loss_type not in ("gspo", "luspo", "cispo", "sapo", "vespo"):
        for name, flags in (("low", terms.low), ("high", terms.high)):
            assert float(flags.sum() / mask.sum()) == pytest.approx(metrics[f"clip_ratio/{name}_mean"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"entropy_coef": 0.1},
        {"entropy_coef": -0.1, "beta": 0.3},
        *({"top_entropy_quantile": share, "beta": 0.3} for share in (0.0, 0.2, 0.5)),
        {"top_entropy_quantile": 0.2, "entropy_coef": 0.1},
    ],
    ids=str,
)
def test_the_entropy_bonus_and_the_most_uncertain_tokens_are_trls(loss_type, settings):
    policy, old, ref, advantages, mask = batch()
    entropies = 3 * torch.rand(policy.shape, generator=torch.Generator().manual_seed(1))
    policy.requires_grad_(), entropies.requires_grad_()
    objective = Objective(**{"loss_type": loss_type, "beta": 0.0, **settings}, max_completion_length=LONGEST)
    weights, known = weigh(mask, loss_type, LONGEST), entropies.detach()
    chosen = most_uncertain(known, mask, share=objective.top_entropy_quantile, step_entropies=known[mask])
    ours = grpo_loss(policy, old, ref, advantages, weights * chosen, objective, kl_weights=weights).loss
    ours = ours - entropy_bonus(entropies, chosen, objective, tokens=int(chosen.sum()))
    theirs, _ = trl_loss(policy, old, ref, advantages, mask, objective, entropies=entropies)
    torch.testing.assert_close(ours, theirs)
    for tensor in (policy, entropies):
        ours_grad, their_grad = (
            torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for loss in (ours, theirs)
        )
        torch.testing.assert_close(ours_grad, their_grad)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_of_two_micro_batches_is_trls(loss_type):
    """Token weights are TRL's also with gradient accumulation; bnpo averages its micro-batches."""
    policy, old, ref, advantages, mask = batch()
    objective = Objective(loss_type=loss_type, beta=0.1, max_completion_length=LONGEST)
    halves = slice(0, 4), slice(4, 8)
    weights = step_weights(mask, halves, World(0, 1, torch.device("cpu")), objective)
    ours = grpo_loss(policy, old, ref, advantages, weights, objective).loss
    theirs = sum(
        trl_loss(*(t[part] for t in (policy, old, ref, advantages, mask)), objective,
                 accumulation=2, tokens=int(mask.sum()))[0]
        for part in halves
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs)
