"""A rollout: questions asked, completions sampled, rewards given, advantages worked out.

Q questions on this rank, G completions each, B = Q * G.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_ds.core.advantages import group_advantages, overlong
from grpo_ds.core.objective import RewardScale
from grpo_ds.core.packing import PackedRows, fill_rows, pack
from grpo_ds.core.tally import Tally
from grpo_ds.models.reference import Reference
from grpo_ds.system.ranks import World
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.prompts import encode_prompt
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.sampling import Completions, Sampler


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How questions are put to the model; the same in training, evaluation and `launch/ask.py`."""

    answer_format: AnswerFormat
    few_shot: int
    prefill: bool
    max_prompt_length: int
    system_prompt: str = ""  # "": our own

    def encode(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of each question's prompt."""
        return [_prompt_ids(tokenizer, question, self) for question in questions]

    def texts(self, tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[str]:
        """What the model said, a prefilled <reasoning> put back in front: what rewards and graders read."""
        opening = self.answer_format.opening * self.prefill
        rows = zip(completions.ids, completions.mask, strict=True)
        return [opening + _said(tokenizer, ids[mask]) for ids, mask in rows]


def _said(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " C"]) -> str:
    """A completion's text without the EOS it ends in. Any other control token stays: left out, it could stand in the
    middle of an answer and be paid for."""
    ends_in_control = len(ids) > 0 and not tokenizer.decode(ids[-1:], skip_special_tokens=True)
    return str(tokenizer.decode(ids[:-1] if ends_in_control else ids, skip_special_tokens=False))


@lru_cache(maxsize=20_000)  # a run checks all prompts before its first step, and asks each again every epoch
def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question, style: PromptStyle) -> list[int]:
    return encode_prompt(
        tokenizer,
        question,
        answer_format=style.answer_format,
        few_shot=style.few_shot,
        prefill=style.prefill,
        max_prompt_length=style.max_prompt_length,
        system_prompt=style.system_prompt,
    ).ids


MicroBatch = tuple[PackedRows, Tensor]  # rows for one pass, and the places of their completions among the B


@dataclass(frozen=True, slots=True)
class Groups:
    """Questions, what was answered and what that earned."""

    questions: list[Question]  # Q
    prompts: list[Int[Tensor, " P"]]  # Q
    completions: Completions  # B rows
    texts: list[str]  # B
    rewards: Rewards

    def equal(self) -> list[int]:
        """Which of the Q groups earned the same with every completion, and so have no advantage."""
        size = len(self.texts) // len(self.questions)
        groups = [self.rewards.total[start : start + size] for start in range(0, len(self.texts), size)]
        return [place for place, group in enumerate(groups) if min(group) == max(group)]


@dataclass(frozen=True, slots=True)
class Rollout(Groups):
    """All that an update needs to know of one sampling round."""

    advantages: Float[Tensor, " B"]
    counted: Bool[Tensor, "B C"]  # the completions' mask, less the truncated ones if these are masked
    ref_logprobs: Float[Tensor, "B C"]  # 0 without a reference

    def count_into(self, tally: Tally, answer_format: AnswerFormat) -> None:
        """What is logged of it: rewards, right answers, lengths, and how often a group was of one mind."""
        count, total = len(self.texts), torch.tensor(self.rewards.total)
        size = count // len(self.questions)
        right = [
            answer_format.parse(text).answer == self.questions[i // size].label for i, text in enumerate(self.texts)
        ]
        tally.add("accuracy", sum(right), count)
        tally.add("reward", sum(self.rewards.total), count)
        for name, values in self.rewards.by_name.items():
            tally.add_all({f"rewards/{name}": [value for value in values if value is not None]})
        spread = total.view(len(self.questions), -1).std(dim=1)
        tally.add("reward_std", spread.sum(), len(spread))
        tally.add("frac_reward_zero_std", len(self.equal()), len(spread))
        tally.add("completion_length", self.completions.lengths().double().sum(), count)
        tally.add("ended", self.completions.ended.sum(), count)

    def table(self) -> list[dict[str, Any]]:
        """What was written, a row a completion, for people."""
        size = len(self.texts) // len(self.questions)
        return [
            {
                "question": self.questions[row // size].text,
                "label": self.questions[row // size].label,
                "completion": text,
                "reward": self.rewards.total[row],
                **{f"rewards/{name}": values[row] for name, values in self.rewards.by_name.items()},
                "advantage": float(self.advantages[row]),
            }
            for row, text in enumerate(self.texts)
        ]

    def micro_batches(self, pack_tokens: int = 0, *, only: Sequence[int] | None = None) -> list[MicroBatch]:
        """Packed rows of at most `pack_tokens` tokens (0: all in one), and which of the B completions they hold."""
        return micro_batches(self.prompts, self.completions, pack_tokens, only=only)


@dataclass(slots=True)
class PartialStep:
    """A rollout of whose mu updates some are done."""

    rollout: Rollout
    redrawn: int = 0
    updates: int = 0
    old_logprobs: Tensor | None = None  # [B, C], before the first update
    tally: Tally = field(default_factory=Tally)

    def count(self, tally: Tally, logprobs: Tensor) -> None:
        """One more update is done, with what happened and the log-probs before it."""
        self.updates += 1
        self.tally.merge(tally)
        if self.old_logprobs is None:
            self.old_logprobs = logprobs


def micro_batches(
    prompts: Sequence[Tensor], completions: Completions, pack_tokens: int = 0, *, only: Sequence[int] | None = None
) -> list[MicroBatch]:
    """Packed rows of at most `pack_tokens` tokens (0: all in one), and which of the B completions they hold."""
    lengths, chosen = completions.lengths().tolist(), None if only is None else set(only)
    batches = fill_rows([len(prompt) for prompt in prompts], lengths, budget=pack_tokens, only=chosen)
    ids, mask = completions.ids, completions.mask
    return [
        (
            pack(rows, prompts, ids, mask, pad_id=HIDDEN_ID),
            torch.tensor([b for row in rows for b in row.completions], device=ids.device),
        )
        for rows in batches
    ]


HIDDEN_ID = 0  # of padding in packed rows: any will do, the mask hides it and it is never a target


def sample(
    sampler: Sampler,
    style: PromptStyle,
    questions: list[Question],
    *,
    group_size: int,
    temperature: float,
    seed: int,
) -> tuple[list[Tensor], Completions]:
    """group_size completions for each question, and the prompts they continue; `seed` alone decides the draw."""
    prompts = style.encode(sampler.tokenizer, questions)
    completions = sampler(prompts, group_size=group_size, temperature=temperature, seed=seed)
    return [torch.tensor(prompt, device=completions.ids.device) for prompt in prompts], completions


def reward(
    texts: list[str],
    questions: list[Question],
    completions: Completions,
    *,
    score: Callable[[list[str], list[Question]], Rewards],
    max_completion_length: int,
    overlong_buffer: int,
    overlong_penalty: float,
) -> Rewards:
    """What the completions of each question earn, less a penalty for the overlong where there is a buffer."""
    group_size = len(texts) // len(questions)
    rewards = score(texts, [question for question in questions for _ in range(group_size)])
    if not overlong_buffer:
        return rewards
    lengths = completions.lengths()
    penalty = overlong(lengths, max_length=max_completion_length, buffer=overlong_buffer) * overlong_penalty
    return rewards.plus("overlong", penalty.tolist())


def judge(
    groups: Groups,
    world: World,
    *,
    scale_rewards: RewardScale,
    mask_truncated: bool,
    reference: Reference | None,
    pack_tokens: int,
) -> Rollout:
    """Advantages, the tokens that count, and the reference's log-probs."""
    done, group_size = groups.completions, len(groups.texts) // len(groups.questions)
    device = done.ids.device
    ranks = world.gather(groups.rewards.total) if scale_rewards == "batch" else [groups.rewards.total]
    advantages = group_advantages(
        torch.tensor(groups.rewards.total, device=device),
        group_size=group_size,
        scale=scale_rewards,
        step_rewards=torch.tensor([value for rank in ranks for value in rank], device=device),
    )
    counted = done.mask & done.ended[:, None] if mask_truncated else done.mask
    ref_logprobs = torch.zeros(done.mask.shape, device=device)
    if reference:
        for rows, part in micro_batches(groups.prompts, done, pack_tokens):
            ref_logprobs[part] = reference(rows)
    return Rollout(
        groups.questions, groups.prompts, done, groups.texts, groups.rewards, advantages, counted, ref_logprobs
    )
