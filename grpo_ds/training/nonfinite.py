"""Numbers that are not finite: found before a step uses them, reported and counted; too many stop the run.

B completions of Q questions, C tokens in the longest; W = C, or C + n with n labels (core/expected_reward.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_ds.errors import NumbersError
from grpo_ds.models.policy import first_bad_weight
from grpo_ds.system.files import write_whole
from grpo_ds.system.ranks import World
from grpo_ds.training.engine import Engine
from grpo_ds.training.rollout import Rollout

BAD_BATCH = "bad_batch.json"
# Kinds of numbers, causes before their effects, each with the remedy if it comes first.
REMEDIES = {
    "reward": "A reward function returned numbers too large for fp32: scale them down, or its --reward_weights.",
    "advantage": "Rewards differ so much that fp32 cannot hold their spread: scale them down, or --reward_weights.",
    "reference log-prob": "The reference returns NaN or infinity: try --beta 0, or (without LoRA) --reference bf16.",
    "old log-prob": "Try a lower --learning_rate, or --mu 1.",
    "log-prob": "The policy itself returns NaN or infinity: start again with a lower --learning_rate.",
    "loss": "Try a lower --learning_rate, a smaller --beta, or --kl_estimator k2.",
    "gradient at the smallest loss scale": "fp16 is too narrow for this model or loss: try smaller rewards, a smaller "
    '--beta, or fp32: "fp16": {"enabled": false}, "bf16": {"enabled": false} in the DeepSpeed JSON.',
    "gradient": "Try a lower --learning_rate, a smaller --beta, or smaller rewards.",
}


def find_bad(
    engine: Engine,
    rollout: Rollout,
    old_logprobs: Float[Tensor, "B W"] | None,
    logprobs: Float[Tensor, "B W"],
    loss: float,
    world: World,
) -> list[str]:
    """Name the numbers that are not finite on any rank before a step, cause first; the same list on every rank.

    Example: ["reward (completion 1 of question 17)", "loss"]. If there are none, ranks only add eight numbers.
    """
    norms = engine.gradient_norms()
    gradient = "gradient at the smallest loss scale" if engine.loss_scale.is_stuck else "gradient"
    places = {
        **_bad_completions(rollout, old_logprobs, logprobs),
        "loss": [] if isfinite(loss) else [""],
        gradient: [name for name, norm in norms.items() if not isfinite(norm)],
    }
    # Squared in fp32, as DeepSpeed sums it over the ranks: the square of a finite norm may be infinite.
    squared = sum(norm * norm for norm in norms.values())
    counts = world.sum(torch.tensor([*map(len, places.values()), squared], dtype=torch.float32))
    if not counts[:-1].any() and counts[-1].isfinite():
        return []
    ranks = world.gather(places)
    everywhere = {kind: [place for rank in ranks for place in rank[kind]] for kind in places}
    return [_named(kind, found) for kind, found in everywhere.items() if found] or [f"{gradient} (its norm overflows)"]


def is_overflow(engine: Engine, bad: Sequence[str]) -> bool:
    """True if only gradients are not finite and a lower loss scale may mend that. bad: from `find_bad`."""
    return engine.loss_scale.can_fall and bool(bad) and bad[0].startswith("gradient")


def refuse_bad_weights(model: torch.nn.Module) -> None:
    """Raise NumbersError if a weight is not finite; call it before anything is written."""
    if (name := first_bad_weight(model)) is not None:
        raise NumbersError(
            f"The model is not saved: its weight {name} is not finite.\n"
            "Earlier checkpoints are untouched. Start again from there with a lower --learning_rate."
        )


class NonfiniteSteps:
    """Counts skipped steps in a row and reports each; more than `limit` of them end the run."""

    def __init__(self, limit: int, world: World, say: Callable[[str], None]) -> None:
        self.limit, self.world, self.say = limit, world, say
        self.in_a_row: list[int] = []
        self.folder: Path | None = None  # place of bad_batch.json; None: none is written

    def record_step(self, bad: Sequence[str], step: int, rollout: Rollout, **logprobs: Tensor | None) -> None:
        """Record the result of an update of `step` (from 0); every rank calls it.

        bad: from `find_bad`. logprobs: name -> [B, C], for bad_batch.json. Raises NumbersError above the limit.
        """
        if not bad:
            self.in_a_row = []
            return
        if step not in self.in_a_row:  # the later updates of --mu fail like the first
            self.in_a_row.append(step)
            count = f"{len(self.in_a_row)} in a row, of at most {self.limit}"
            self.say(
                f"Step {step + 1} is skipped ({count}): {', '.join(bad)} not finite. The weights have not changed."
            )
        if len(self.in_a_row) > self.limit:
            self._stop(bad, rollout, logprobs)

    def _stop(self, bad: Sequence[str], rollout: Rollout, logprobs: Mapping[str, Tensor | None]) -> None:
        first, last = self.in_a_row[0] + 1, self.in_a_row[-1] + 1
        shares = self.world.gather(_described(rollout, logprobs))
        where = "It was not saved, as this run has no folder."
        if self.folder is not None:
            where = f"It is saved for inspection: {self.folder / BAD_BATCH}"
            if self.world.is_first:
                completions = [{"rank": rank, **row} for rank, rows in enumerate(shares) for row in rows]
                batch = {"step": last, "bad": list(bad), "bad_steps_in_a_row": len(self.in_a_row)}
                text = json.dumps(_strict({**batch, "completions": completions}), indent=1, allow_nan=False)
                try:
                    write_whole(self.folder / BAD_BATCH, f"{text}\n")
                except OSError as error:
                    where = f"It could not be saved in {self.folder} ({error.strerror})."
        causes = [kind for kind in REMEDIES if bad[0].startswith(kind)]
        raise NumbersError(
            f"Numbers were not finite in {'steps' if last > first else 'step'} "
            f"{f'{first} to {last}' if last > first else first}: more than --max_bad_steps {self.limit} in a row.\n"
            f"In the last batch: {', '.join(bad)[:250]}.\n{where}\n"
            f"The weights are those before step {first}; no other model is written.\n{REMEDIES[causes[0]]}"
        )


def _bad_completions(rollout: Rollout, old_logprobs: Tensor | None, logprobs: Tensor) -> dict[str, list[str]]:
    """Places at which counted rewards, advantages and log-probs are not finite, by kind."""
    counted = rollout.counted

    def bad(values: Float[Tensor, "B W"] | None) -> Bool[Tensor, " B"]:
        if values is None:
            return torch.zeros_like(counted[:, 0])
        return (~values[:, : counted.shape[1]].isfinite() & counted).any(dim=1)

    some = counted.any(dim=1)
    rewards = torch.tensor(rollout.rewards.total, dtype=torch.float32, device=some.device)
    rows = {
        "reward": ~rewards.isfinite(),
        "advantage": ~rollout.advantages.isfinite() & some,
        "reference log-prob": bad(rollout.ref_logprobs),
        "old log-prob": bad(old_logprobs),
        "log-prob": bad(logprobs),
    }
    return {kind: [_place(rollout, b) for b in found.nonzero().flatten().tolist()] for kind, found in rows.items()}


def _place(rollout: Rollout, b: int) -> str:
    question, completion = divmod(b, len(rollout.texts) // len(rollout.questions))
    return f"completion {completion + 1} of question {rollout.questions[question].id}"


def _named(kind: str, places: Sequence[str]) -> str:
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{kind} ({places[0]}{more})" if places[0] else kind


def _described(rollout: Rollout, logprobs: Mapping[str, Tensor | None]) -> list[dict[str, Any]]:
    """Describe each completion and the numbers that it led to, for bad_batch.json."""
    given = {**logprobs, "reference": rollout.ref_logprobs}
    group_size, lengths = len(rollout.texts) // len(rollout.questions), rollout.completions.lengths().tolist()
    return [
        {
            "question": rollout.questions[b // group_size].id,
            "completion": b % group_size + 1,
            "text": text,
            "tokens": lengths[b],
            "reward": rollout.rewards.total[b],
            "rewards": {name: values[b] for name, values in rollout.rewards.by_name.items()},
            "advantage": float(rollout.advantages[b]),
            "logprobs": {
                name: _statistics(values[b, : len(rollout.counted[b])][rollout.counted[b]])
                for name, values in given.items()
                if values is not None
            },
        }
        for b, text in enumerate(rollout.texts)
    ]


def _statistics(values: Float[Tensor, " N"]) -> dict[str, float]:
    finite = values[values.isfinite()].double()
    found = {"lowest": finite.min(), "mean": finite.mean(), "highest": finite.max()} if len(finite) else {}
    return {"not_finite": len(values) - len(finite), **{name: float(value) for name, value in found.items()}}


def _strict(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
