"""A rollout: questions asked, completions sampled, rewards given, advantages worked out.

Q questions on this rank, G completions each, B = Q * G.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_ds.core.advantages import group_advantages
from grpo_ds.core.packing import PackedRows, fill_rows, pack
from grpo_ds.models.reference import Reference
from grpo_ds.sampling import Completions, Sampler
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.prompts import encode_prompt
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards


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
        return [opening + str(tokenizer.decode(ids[mask], skip_special_tokens=True)) for ids, mask in rows]


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
class Rollout:
    """All that an update needs to know of one sampling round."""

    questions: list[Question]  # Q
    prompts: list[Int[Tensor, " P"]]  # Q
    completions: Completions  # B rows
    texts: list[str]  # B
    rewards: Rewards
    advantages: Float[Tensor, " B"]
    ref_logprobs: Float[Tensor, "B C"]  # 0 without a reference

    def micro_batches(self, pack_tokens: int = 0, *, skip_zeros: bool = False) -> list[MicroBatch]:
        """Packed rows of at most `pack_tokens` tokens (0: all in one), and which of the B completions they hold.

        skip_zeros: without the completions of advantage 0.
        """
        only = self.advantages.nonzero().flatten().tolist() if skip_zeros else None
        return micro_batches(self.prompts, self.completions, pack_tokens, only=only)


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


def judge(
    questions: list[Question],
    prompts: list[Tensor],
    completions: Completions,
    texts: list[str],
    *,
    score: Callable[[list[str], list[Question]], Rewards],
    reference: Reference | None,
    pack_tokens: int,
) -> Rollout:
    """Rewards, advantages and reference log-probs of sampled completions."""
    group_size = len(texts) // len(questions)
    asked = [question for question in questions for _ in range(group_size)]
    rewards = score(texts, asked)
    device = completions.ids.device
    advantages = group_advantages(torch.tensor(rewards.total, device=device), group_size=group_size)
    ref_logprobs = torch.zeros(completions.mask.shape, device=device)
    if reference:
        for rows, part in micro_batches(prompts, completions, pack_tokens):
            ref_logprobs[part] = reference(rows)
    return Rollout(questions, prompts, completions, texts, rewards, advantages, ref_logprobs)
