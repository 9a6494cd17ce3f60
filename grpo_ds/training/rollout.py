"""A rollout as data: questions, completions, rewards, advantages, and the reference's log-probs.

Q questions on this rank, G completions each, B = Q * G; P prompt tokens, C tokens in the longest completion.
collect.py makes groups, `make_rollout` adds the tensors of an update, update.py trains on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_ds.core.advantages import decoupled_sum, group_advantages, step_spread
from grpo_ds.core.expected_reward import LabelAdvantages, LabelProbs, expected_advantages, reasoning_share, with_labels
from grpo_ds.core.objective import RewardAggregation, RewardScale, unknown_name
from grpo_ds.core.packing import Labels, PackedRows, fill_rows, pack
from grpo_ds.core.tally import Tally
from grpo_ds.models.reference import Reference
from grpo_ds.system.ranks import World
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import broken_rule
from grpo_ds.task.grading import is_right
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import CORRECTNESS
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.sampling import Completions

TABLE = (
    "question",
    "label",
    "completion",
    "broken_rule",
    "reward",
    "advantage",
)  # columns that log_extra does not replace
HIDDEN_ID = 0  # id of padding in packed rows: the mask hides it and it is never a target, so any will do
MicroBatch = tuple[PackedRows, Tensor]  # rows for one pass, and the indices of their completions among the B


@dataclass(frozen=True, slots=True)
class Groups:
    """Questions with their sampled and rewarded completions.

    Example: two questions with three completions each (Q = 2, G = 3, B = 6)
        questions    [Question("a1", ...), Question("b2", ...)]
        prompts      [tensor of 412 ids, tensor of 388 ids]
        completions  Completions(ids [6 C], mask [6 C], ended [6])
        texts        ["<reasoning>...</answer>", ...]  # 6
        rewards      Rewards(total=[2.4, 0.4, 0.0, 2.4, 2.4, 0.4], by_name={"correctness": [...], "format": [...]})
        labels       LabelProbs(places [6], ids [2], probs [6 2], right [6])
    """

    questions: list[Question]  # Q
    prompts: list[Int[Tensor, " P"]]  # Q; one per row if the model cannot share a prompt
    completions: Completions  # B rows
    texts: list[str]  # B
    rewards: Rewards
    labels: LabelProbs | None  # None: a label has no first token of its own

    @property
    def group_size(self) -> int:
        """G, the completions of one question."""
        return len(self.texts) // len(self.questions)

    def without_spread(self, *, by_name: bool = False) -> list[int]:
        """Indices of the groups whose completions all have the same reward. by_name: the same of every function."""
        columns = self.rewards.by_name.values() if by_name else [self.rewards.total]
        rows, size = list(zip(*columns, strict=True)), self.group_size
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [q for q, group in enumerate(groups) if all(row == group[0] for row in group)]


@dataclass(frozen=True, slots=True)
class Rollout(Groups):
    """Groups with the tensors of an update.

    Example: the groups above
        advantages    tensor([ 1.15, -0.33, -0.82, 0.58, 0.58, -1.15])
        counted       completions.mask, without the rows that --mask_truncated_completions removes
        ref_logprobs  [6 C], e.g. -0.7 for a likely token, 0 without a reference
    """

    advantages: Float[Tensor, " B"]
    counted: Bool[Tensor, "B C"]  # tokens that train
    ref_logprobs: Float[Tensor, "B C"]
    of_labels: LabelAdvantages | None = None  # with --answer_reward expected

    @property
    def label_columns(self) -> int:
        """n, the columns of labels behind those of tokens; 0 if answers are drawn."""
        return 0 if self.of_labels is None else self.of_labels.labels.shape[1]

    def all_advantages(self) -> Float[Tensor, "B _"]:
        """Advantages of the tokens and labels; one column if they are the same for all tokens of a completion."""
        if self.of_labels is None or self.labels is None:
            return self.advantages[:, None]
        return with_labels(self.advantages, self.of_labels, self.labels.places, self.counted.shape[1])

    def without_advantage(self) -> int:
        """Number of groups that teach nothing, as their completions have equal rewards."""
        return int((self.advantages.view(-1, self.group_size) == 0).all(dim=1).sum())

    def count_into(self, tally: Tally, answer_format: AnswerFormat) -> None:
        """Add this rank's part of the logged means, under TRL's names if TRL has them."""
        count, size = len(self.texts), self.group_size
        if answer_format.kind != "none":
            answers = [answer_format.parse(text).answer for text in self.texts]
            right = [is_right(answer, self.questions[i // size], answer_format) for i, answer in enumerate(answers)]
            tally.add("accuracy", sum(right), count)
            tally.add("well_formed", sum(answer is not None for answer in answers), count)
        tally.add("reward", sum(self.rewards.total), count)
        for name, values in self.rewards.by_name.items():
            tally.add_all({f"rewards/{name}/mean": [value for value in values if value is not None]})
        tally.add("frac_reward_zero_std", self.without_advantage(), len(self.questions))
        tally.add("completions/mean_length", self.completions.lengths().double().sum(), count)
        tally.add("completions/clipped_ratio", (~self.completions.ended).sum(), count)
        if self.labels:
            self._count_labels(tally, self.labels, answer_format.labels)

    def _count_labels(self, tally: Tally, labels: LabelProbs, names: Sequence[str]) -> None:
        """Add what the labels' probabilities say, over the completions that have them."""
        placed, q = labels.placed, labels.p_right[labels.placed]
        tally.add("p_right", q.double().sum(), placed.sum())
        for name, p in zip(names, labels.probs.double().sum(dim=0), strict=True):
            tally.add(f"lean/{name}", p, placed.sum())
        share = reasoning_share(labels, group_size=self.group_size)
        tally.add("reasoning_share", share.double().sum(), len(share))
        if self.of_labels:
            tally.add("expected_answers", placed.sum(), len(placed))

    def rewards_by_metric(self) -> dict[str, list[float]]:
        """Values whose standard deviation over all ranks is logged, by the name of that metric."""
        by_name = self.rewards.by_name.items()
        parts = {f"rewards/{name}/std": [value for value in values if value is not None] for name, values in by_name}
        return {"reward_std": list(self.rewards.total), **parts}

    def tokens(self) -> int:
        """Tokens of prompts and completions, the prompt counted for each completion as in TRL's num_tokens."""
        prompts = sum(map(len, self.prompts)) * (len(self.texts) // len(self.prompts))
        return prompts + int(self.completions.lengths().sum())

    def table(self, answer_format: AnswerFormat) -> list[dict[str, Any]]:
        """One row per completion, for completions.jsonl and the trackers' tables."""
        size, ended = self.group_size, self.completions.ended.tolist()
        return [
            {
                "question": self.questions[b // size].text,
                "label": self.questions[b // size].label,
                "completion": text,
                "broken_rule": broken_rule(text, answer_format, cut=not ended[b]),
                "reward": self.rewards.total[b],
                **{f"rewards/{name}": values[b] for name, values in self.rewards.by_name.items()},
                "advantage": float(self.advantages[b]),
                **{name: values[b] for name, values in self.rewards.extra.items() if name not in TABLE},
            }
            for b, text in enumerate(self.texts)
        ]

    def micro_batches(self, pack_tokens: int = 0, *, only: Sequence[int] | None = None) -> list[MicroBatch]:
        """Packed rows of at most `pack_tokens` tokens (0: all in one), and the completions that they hold."""
        labels = Labels(self.labels.places, self.labels.ids) if self.labels and self.label_columns else None
        return micro_batches(self.prompts, self.completions, pack_tokens, only=only, labels=labels)


@dataclass(slots=True)
class PartialStep:
    """A rollout with some of its mu updates done.

    Example:
        PartialStep(rollout, updates=1, old_logprobs=logprobs)  # with --mu 2: one update left, saved by a checkpoint
    """

    rollout: Rollout
    redrawn: int = 0  # groups exchanged by --dynamic_sampling
    updates: int = 0
    old_logprobs: Float[Tensor, "B C"] | None = None  # pi_old's; None before the first update: pi_old is the policy
    tally: Tally = field(default_factory=Tally)

    def record(self, tally: Tally, logprobs: Float[Tensor, "B C"]) -> None:
        """Record an update: its sums, and the log-probs before it, which are the old ones of later updates."""
        self.updates += 1
        self.tally.merge(tally)
        if self.old_logprobs is None:
            self.old_logprobs = logprobs


def micro_batches(
    prompts: Sequence[Tensor],
    completions: Completions,
    pack_tokens: int = 0,
    *,
    only: Sequence[int] | None = None,
    labels: Labels | None = None,
) -> list[MicroBatch]:
    """Packed rows of at most `pack_tokens` tokens (0: all in one), and the completions that they hold.

    only: indices of the completions that take part; None: all.
    labels: targets beside the tokens, of all completions.
    """
    lengths, chosen = completions.lengths().tolist(), None if only is None else set(only)
    batches = fill_rows([len(prompt) for prompt in prompts], lengths, budget=pack_tokens, only=chosen)
    ids, mask = completions.ids, completions.mask
    return [
        (
            pack(rows, prompts, ids, mask, pad_id=HIDDEN_ID, labels=labels),
            torch.tensor([b for row in rows for b in row.completions], device=ids.device),
        )
        for rows in batches
    ]


def make_rollout(
    groups: Groups,
    world: World,
    *,
    scale_rewards: RewardScale,
    mask_truncated: bool,
    reference: Reference | None,
    pack_tokens: int,
    expected_reward: float = 0.0,
    aggregation: RewardAggregation = "sum_then_normalize",
    reward_weights: Mapping[str, float] | None = None,
) -> Rollout:
    """Add advantages, the tokens that train, and the reference's log-probs; every rank calls it.

    expected_reward: reward for a right answer, of which `groups.rewards` has the expectation; 0: it was drawn.
    reward_weights: of each reward's name, for the aggregation normalize_then_sum.
    """
    completions = groups.completions
    advantages, of_labels = advantages_of(groups, world, scale_rewards, expected_reward, aggregation, reward_weights)
    counted = completions.mask & completions.ended[:, None] if mask_truncated else completions.mask
    ref_logprobs = torch.zeros(completions.mask.shape, device=counted.device)
    if reference:
        for rows, part in micro_batches(groups.prompts, completions, pack_tokens):
            ref_logprobs[part] = reference(rows)
    fields = groups.questions, groups.prompts, completions, groups.texts, groups.rewards, groups.labels
    return Rollout(*fields, advantages, counted, ref_logprobs, of_labels)


def advantages_of(
    groups: Groups,
    world: World,
    scale: RewardScale,
    expected_reward: float,
    aggregation: RewardAggregation = "sum_then_normalize",
    weights: Mapping[str, float] | None = None,
) -> tuple[Float[Tensor, " B"], LabelAdvantages | None]:
    """Return the advantages of the completions, and those of the labels if rewards are expectations."""
    if aggregation == "normalize_then_sum":
        return decoupled_advantages(groups, world, weights or {}), None
    if aggregation != "sum_then_normalize":
        raise unknown_name("multi_objective_aggregation", aggregation, RewardAggregation)
    device, labels = groups.completions.ids.device, groups.labels
    rewards = torch.tensor(groups.rewards.total, device=device)

    def on_all_ranks(values: Tensor) -> Tensor:
        ranks = world.gather(values.tolist()) if scale == "batch" else [values.tolist()]
        return torch.tensor([value for rank in ranks for value in rank], device=device)

    options: Any = {"group_size": groups.group_size, "scale": scale, "step_rewards": on_all_ranks(rewards)}
    if labels is None or not expected_reward:
        return group_advantages(rewards, **options), None
    answers = torch.tensor([value or 0.0 for value in groups.rewards.by_name[CORRECTNESS]], device=device)
    options["step_hidden_variance"] = on_all_ranks(expected_reward**2 * labels.variance)
    return expected_advantages(rewards, answers, labels, reward=expected_reward, **options)


def decoupled_advantages(groups: Groups, world: World, weights: Mapping[str, float]) -> Float[Tensor, " B"]:
    """Return GDPO's advantages: each reward is normalised by itself. weights: of each reward's name."""
    by_name, nan = groups.rewards.by_name, float("nan")
    columns = [[nan if value is None else value for value in values] for values in by_name.values()]
    rewards = torch.tensor(columns, device=groups.completions.ids.device).T  # [B, R]
    sums = decoupled_sum(
        rewards, torch.tensor([weights[name] for name in by_name], device=rewards.device), group_size=groups.group_size
    )
    scored = sums[~rewards.isnan().all(dim=1)]
    everywhere = [value for rank in world.gather(scored.tolist()) for value in rank]
    return sums / step_spread(torch.tensor(everywhere, device=sums.device))
