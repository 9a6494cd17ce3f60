"""The expected reward of an answer: all labels, each with its probability, instead of the one that was drawn.

The labels are a closed set. So for a completion that answers with one of them, the reward for a right answer can be
computed as an expectation over the answer, given the reasoning: reward * q, with q the probability of the right label
among the labels. This is Rao-Blackwell: the same mean as the drawn reward, never more variance. VeriFree (Zhou et al.
2025) and RLPR (Yu et al. 2025) do it with the likelihood of one reference answer.

The gradient has two parts. The tokens of the reasoning learn from the advantage of the expected reward. At the
answer's first token the surrogate of the loss is summed over the labels: n more columns of log-probs, each with the
old policy's probability as its weight and the advantage that this answer would have had; the drawn token keeps the
other rewards.

Completions that do not answer in form, or in other tokens, keep their drawn reward: `places` is NOWHERE for them.

B completions in groups of G consecutive rows, C tokens in the longest; n labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from grpo_ds.core.advantages import centred, reward_spread
from grpo_ds.core.objective import RewardScale
from grpo_ds.core.pick import NOWHERE


@dataclass(frozen=True, slots=True)
class LabelProbs:
    """Probabilities of the labels at the place where each completion answers.

    Example: two completions of a question whose right label is the first of two; the second is out of form.
        >>> places, ids, right = torch.tensor([5, NOWHERE]), torch.tensor([9693, 2201]), torch.tensor([0, 0])
        >>> labels = LabelProbs(places, ids, torch.tensor([[0.8, 0.2], [0, 0]]), right)
        >>> labels.p_right
        tensor([0.8000, 0.0000])
    """

    places: Int[Tensor, " B"]  # index of the answer's first token
    ids: Int[Tensor, " n"]  # first token of each label
    probs: Float[Tensor, "B n"]  # of the labels there, among themselves; 0 NOWHERE
    right: Int[Tensor, " B"]  # index of the right label

    def exchanged(self, fresh: "LabelProbs", rows: Sequence[int]) -> "LabelProbs":
        """Return these rows of both, numbered one after the other."""
        both = [torch.cat(pair)[rows] for pair in zip(self.of_rows(), fresh.of_rows(), strict=True)]
        return LabelProbs(both[0], self.ids, both[1], both[2])

    def of_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The fields that have a row for each completion."""
        return self.places, self.probs, self.right

    @property
    def placed(self) -> Tensor:
        """True where the completion has a place, [B]."""
        return self.places != NOWHERE

    @property
    def p_right(self) -> Float[Tensor, " B"]:
        """q, the probability of the right label; 0 NOWHERE."""
        return self.probs.gather(1, self.right[:, None]).squeeze(1)

    @property
    def variance(self) -> Float[Tensor, " B"]:
        """q (1 - q), the variance of a drawn answer being right."""
        return self.p_right * (1 - self.p_right)


@dataclass(frozen=True, slots=True)
class LabelAdvantages:
    """Advantages of the labels, beside those of the completions.

    Example: the completion of `LabelProbs` above; a drawn answer learns from the other rewards alone.
        LabelAdvantages(labels=tensor([[0.9, -1.1], [0, 0]]), drawn=tensor([0.1, 0.0]))
    """

    labels: Float[Tensor, "B n"]  # of answering with each label; 0 NOWHERE
    drawn: Float[Tensor, " B"]  # of the answer's first token, made of the other rewards


def expected_advantages(
    rewards: Float[Tensor, " B"],
    answer_rewards: Float[Tensor, " B"],
    labels: LabelProbs,
    *,
    reward: float,
    group_size: int,
    scale: RewardScale,
    step_rewards: Float[Tensor, " N"] | None = None,
    step_hidden_variance: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " B"], LabelAdvantages]:
    """Return the advantages of the completions and those of the labels.

    rewards: the sum of all rewards; answer_rewards: the part for a right answer, reward * q where labels.placed.
    reward: for a right answer. The other arguments: as in `reward_spread`.
    """
    spread = reward_spread(
        rewards,
        group_size=group_size,
        scale=scale,
        hidden_variance=reward**2 * labels.variance,
        step_rewards=step_rewards,
        step_hidden_variance=step_hidden_variance,
    )
    of_answers = centred(answer_rewards, group_size=group_size)
    # With another answer, the group's mean would be another too.
    own = reward * (1 - 1 / group_size) * (one_hot(labels.right, labels.probs.shape[1]) - labels.p_right[:, None])
    placed = labels.placed
    return centred(rewards, group_size=group_size) / spread, LabelAdvantages(
        labels=(of_answers[:, None] + own) / spread[:, None] * placed[:, None],
        drawn=centred(rewards - answer_rewards, group_size=group_size) / spread * placed,
    )


def reasoning_share(labels: LabelProbs, *, group_size: int) -> Float[Tensor, " _"]:
    """Share of the variance of drawn answers in a group that comes from the reasoning: var(q) / (var(q) + mean q(1-q)).

    0: all completions of the group leave the answer equally open. Groups without two placed completions are left out.
    """
    groups = zip(*(it.split(group_size) for it in (labels.p_right, labels.variance, labels.placed)), strict=True)
    chosen = [(q[placed].var(), drawn[placed].mean()) for q, drawn, placed in groups if placed.sum() > 1]
    return torch.tensor([float(between / (between + within)) if between else 0.0 for between, within in chosen])


def with_labels(
    advantages: Float[Tensor, " B"], extra: LabelAdvantages, places: Int[Tensor, " B"], tokens: int
) -> Float[Tensor, "B W"]:
    """Return the advantage of each of C = `tokens` tokens and, in n more columns, of each label."""
    at = torch.arange(tokens, device=places.device) == places[:, None]
    per_token = torch.where(at, extra.drawn[:, None], advantages[:, None])
    return torch.cat([per_token, extra.labels], dim=1)


def label_weights(
    weights: Float[Tensor, "B C"], label_logprobs: Float[Tensor, "B n"], places: Int[Tensor, " B"]
) -> Float[Tensor, "B n"]:
    """Share the weight of the answer's first token among the labels, by their probabilities; 0 NOWHERE.

    label_logprobs: the old policy's, nats.
    """
    at = weights.gather(1, places.clamp(min=0)[:, None]) * (places != NOWHERE)[:, None]
    return at * label_logprobs.softmax(dim=1)
