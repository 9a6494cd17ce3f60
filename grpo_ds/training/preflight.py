"""Preflight: test the assumptions of training on four made-up completions, with the code that will train.

The completions are short, so preflight takes seconds and little memory with any model, and it changes no bit.
why_not_packed (models/logprob_model.py) has already decided on one row if the model can take packed rows; here
prompts and completions have unequal lengths. Versions are checked before anything is loaded (system/hardware.py).

Q prompts, G completions each, B = Q * G, C tokens in the longest.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import GenerationConfig

from grpo_ds.core.losses import entropy_bonus, grpo_loss
from grpo_ds.core.objective import Objective
from grpo_ds.core.packing import PackedRows
from grpo_ds.errors import PreflightError, one_error
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import first_bad_weight
from grpo_ds.system.ranks import World
from grpo_ds.training.engine import Engine, flag_last
from grpo_ds.training.rollout import MicroBatch, micro_batches
from grpo_ds.training.sampling import Completions, PartialCompletion, Sampler
from grpo_ds.training.update import step_weights

PROMPTS, COMPLETIONS = (7, 4), (5, 3, 2, 5)  # tokens: two groups of two; the first completion of each has ended
GROUP = len(COMPLETIONS) // len(PROMPTS)
SMALL = 1 << 22  # elements; gradients of larger parameters are not compared: 16 MiB in fp32
# Relative to a gradient's norm: DeepSpeed rounds sums over backwards and ranks to the precision of the weights.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
# Mean difference of a log-prob. smollm2-135m has 3e-6 in fp32, 0.05 in bf16; a wrong mask changes every token.
LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
LLM_INT8_TOLERANCE = 2.0  # it rounds differently in training and sampling mode: smollm2-135m by 0.5
# Loss scales tried for fp16: the gradients of so few tokens are larger than those of a run.
LOSS_SCALES = (2.0**12, 2.0**6, 1.0)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the only settings of a neutral generation config
FP16_OVERFLOW = (
    "fp16 cannot hold this model's activations: its log-probs are not finite. Take another model, or fp32: "
    '"fp16": {"enabled": false}, "bf16": {"enabled": false} in the DeepSpeed JSON.'
)
REMEDY = "Nothing was trained or written. Install the versions of constraints.txt; --preflight false skips the checks."


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Made-up completions, different on every rank, and their packed rows."""

    prompts: list[Tensor]  # Q
    completions: Completions  # B rows
    parts: list[MicroBatch]  # one; several if the run's steps have several backwards
    weights: Float[Tensor, "B C"]


def preflight(engine: Engine, sampler: Sampler, world: World, *, objective: Objective, pack_tokens: int) -> None:
    """Check generation config, EOS, log-probs and gradients; every rank calls it.

    Every rank raises PreflightError if one of them has found a problem.
    """
    if (name := first_bad_weight(engine.model)) is not None:
        raise PreflightError(
            f"The model's weight {name} is not finite, so nothing can be learned from it.\n"
            "Load the last good copy: --model takes a hub id or a folder."
        )
    was_training = engine.policy.training
    batch = made_up(engine.policy, sampler, world, objective=objective, pack_tokens=pack_tokens)
    checks = [
        generation_config_problems(engine.model.generation_config),
        ending_problems(batch, sampler.eos_ids),
        logprob_problems(engine, batch),
        gradient_problems(engine, batch, world, objective=objective),
    ]
    here = [problem for check in checks for problem in check]
    engine.policy.train(was_training)
    if found := list(dict.fromkeys(problem for rank in world.gather(here) for problem in rank)):
        raise one_error(PreflightError, "Preflight checks failed:", found, REMEDY)


def made_up(
    policy: LogprobModel, sampler: Sampler, world: World, *, objective: Objective, pack_tokens: int
) -> ProbeBatch:
    """Make completions of ordinary tokens, some with EOS, with the sampler's masks and the run's rows and weights."""
    draw, probe = Random(world.rank), copy.copy(sampler)
    ordinary = [id for id in range(policy.options["vocab_size"]) if id not in sampler.eos_ids]
    prompts = [draw.choices(ordinary, k=length) for length in PROMPTS]
    probe.max_completion_length, probe.full_length, probe.cuda_graphs = max(COMPLETIONS), True, False
    # Sampled, because log-probs of very unlikely tokens are mostly rounding error in 16 and 8 bits.
    said = probe(prompts, group_size=GROUP, temperature=policy.options["temperature"], seed=world.rank).ids.tolist()
    rows = [PartialCompletion(ids[:length]) for ids, length in zip(said, COMPLETIONS, strict=True)]
    pad = sampler.tokenizer.pad_token_id
    for row in rows[::GROUP] if sampler.eos_ids else ():  # pad, if it also ends a turn: a wrong mask would drop it
        row.ids[-1], row.ended = pad if pad in sampler.eos_ids else sampler.eos_ids[-1], True
    done, tensors = sampler.pad_rows(rows), [torch.tensor(prompt, device=policy.model.device) for prompt in prompts]
    two = GROUP * (max(PROMPTS) + max(COMPLETIONS))  # one group per backward
    parts = micro_batches(rows_of(policy, tensors), done, two if pack_tokens else 0)
    weights = step_weights(done.mask, [part for _, part in parts], world, objective)
    return ProbeBatch(tensors, done, parts, weights)


def rows_of(policy: LogprobModel, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The prompt of each row: a row holds a group, or one completion if the model cannot pack."""
    return [prompt for prompt in prompts for _ in range(1 if policy.packs else GROUP)]


def generation_config_problems(config: GenerationConfig | None) -> list[str]:
    """Report settings (top_k, repetition_penalty, ...) that would change sampling but not the log-probs."""
    settings = config.to_diff_dict() if config else {}
    changes = [f"{key} {settings[key]}" for key in settings if key not in (*TOKEN_IDS, "transformers_version")]
    changes = [change for change in changes if not change.startswith("_")]
    listed = ", ".join(changes)
    return [f"The generation config is not neutral: {listed} would change only the sampling."] if changes else []


def ending_problems(batch: ProbeBatch, eos_ids: Sequence[int]) -> list[str]:
    """Check that an ended completion is trained up to and including its EOS, and a cut one to its last token."""
    trained: dict[int, tuple[list[int], Tensor]] = {}
    for rows, part in batch.parts:
        for i, b in enumerate(part.tolist()):
            mask = rows.mask[i]
            trained[b] = rows.targets[i][mask].tolist(), batch.weights[b][mask]
    for b, ended in enumerate(batch.completions.ended.tolist()):
        ids, weights = trained[b]
        if ended and (not ids or ids[-1] not in eos_ids or not bool((weights > 0).all())):
            return ["A completion that ended has its EOS outside the mask: the policy would never learn to stop."]
        if len(ids) != COMPLETIONS[b]:
            return [f"{len(ids)} tokens of a completion of {COMPLETIONS[b]} are trained: the mask is wrong."]
    return []


@torch.no_grad()
def logprob_problems(engine: Engine, batch: ProbeBatch) -> list[str]:
    """Compare packed rows with one row for each completion, and the training mode with the sampling mode."""
    policy, done = engine.policy, batch.completions
    in_8_bits, problems = getattr(policy.model, "is_loaded_in_8bit", False), []
    tolerance = LLM_INT8_TOLERANCE if in_8_bits else LOGPROB_TOLERANCE[policy.model.dtype]
    sampled = _logprobs(policy.eval(), batch.parts, done)
    if policy.model.dtype == torch.float16 and not sampled[done.mask].isfinite().all():
        return [FP16_OVERFLOW]
    if policy.packs:
        with _padded(policy):
            alone = _logprobs(policy, micro_batches(rows_of(policy, batch.prompts), done), done)
        off = _distance(sampled, alone, done.mask)
        if not off <= tolerance:
            problems.append(
                f"Packed rows and single completions differ in log-probs: {off:.2g} per token (at most {tolerance:g})."
            )
    off = _distance(_logprobs(engine, batch.parts, done), sampled, done.mask)
    if not off <= tolerance:
        problems.append(
            f"The first ratio is not 1: log-probs in training and in sampling mode differ by {off:.2g} per token "
            f"(at most {tolerance:g}), as dropout would cause."
        )
    return problems


def gradient_problems(engine: Engine, batch: ProbeBatch, world: World, *, objective: Objective) -> list[str]:
    """Compare the gradients that the optimizer will use, over all backwards and ranks, with plain autograd's."""
    chosen = some_parameters(engine.policy)
    advantages = torch.ones(len(COMPLETIONS), device=batch.weights.device)
    advantages[1::GROUP] = -0.5  # not -1: completions with the same beginning would cancel out

    mask, with_entropy = batch.completions.mask, objective.entropy_coef != 0
    tokens = int(world.sum(mask.sum()))

    def loss_of(run: Callable[..., Tensor], rows: PackedRows, part: Tensor) -> Tensor:
        logprobs = run(rows, entropy_gradient=with_entropy)
        old = logprobs.detach()
        terms = grpo_loss(logprobs, old, old, advantages[part, None], batch.weights[part], objective)
        return terms.loss - entropy_bonus(engine.policy.entropies, mask[part], objective, tokens=tokens)

    for scale in LOSS_SCALES if engine.loss_scale.fp16 else (1.0,):
        with engine.loss_scale.unchanged(scale):
            for (rows, part), last in flag_last(batch.parts):
                engine.backward(loss_of(engine, rows, part), last=last)
            found = {name: engine.gradient(parameter) for name, parameter in chosen.items()}
        engine.abandon()
        if all(gradient.isfinite().all() for gradient in found.values()):  # of all ranks together, so on every rank
            break
    plain = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in chosen.items()}
    engine.policy.train()
    for rows, part in batch.parts:
        loss = loss_of(engine.policy, rows, part) * scale
        parts = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        for total, gradient in zip(plain.values(), parts, strict=True):
            total += 0 if gradient is None else gradient.float() / scale
    wanted = {name: world.sum(gradient) for name, gradient in plain.items()}
    off = {name: float((found[name] - wanted[name]).norm()) for name in chosen}
    norms = {name: float(gradient.norm()) for name, gradient in wanted.items()}
    largest, tolerance = max(norms.values()), GRADIENT_TOLERANCE[engine.model.dtype]
    if not largest > 0:
        return [f"No finite gradient reaches {', '.join(chosen)}."]
    # A gradient that is tiny compared with the others, such as one that cancels out, is mostly rounding.
    wrong = {name: off[name] / max(norms[name], largest / 100) for name in chosen}
    worst = max(wrong, key=lambda name: wrong[name] if wrong[name] == wrong[name] else torch.inf)
    if wrong[worst] <= tolerance:
        return []
    return [
        f"The gradient of {worst} in DeepSpeed is off by {wrong[worst]:.1%} from autograd's (at most {tolerance:.1%})."
    ]


def some_parameters(policy: LogprobModel) -> dict[str, nn.Parameter]:
    """Pick a few small trained parameters: the first, whose gradient passes all layers, the last, and the largest."""
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    small = {name: parameter for name, parameter in trained.items() if parameter.numel() <= SMALL} or trained
    names = list(small)
    names = [names[0], names[-1], max(names, key=lambda name: small[name].numel())]
    return {name: small[name] for name in dict.fromkeys(names)}


def _logprobs(run: Callable, parts: Sequence[MicroBatch], done: Completions) -> Float[Tensor, "B C"]:
    logprobs = torch.zeros(done.mask.shape, device=done.mask.device)
    for rows, part in parts:
        logprobs[part] = run(rows).float()
    return logprobs


def _distance(one: Tensor, two: Tensor, mask: Bool[Tensor, "B C"]) -> float:
    """Mean difference per token: in 16 bits one rare token may differ more; a wrong mask changes all tokens."""
    return float((one - two).abs()[mask].mean())


@contextmanager
def _padded(policy: LogprobModel) -> Iterator[None]:
    policy.packs = False
    try:
        yield
    finally:
        policy.packs = True
