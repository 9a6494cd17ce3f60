"""A rollout: questions asked, completions sampled, rewards given, advantages worked out.

Q questions on this rank, G completions each, B = Q * G.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_ds.core.advantages import group_advantages
from grpo_ds.core.packing import PackedRows, pack
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
        return [
            encode_prompt(
                tokenizer,
                question,
                answer_format=self.answer_format,
                few_shot=self.few_shot,
                prefill=self.prefill,
                max_prompt_length=self.max_prompt_length,
                system_prompt=self.system_prompt,
            ).ids
            for question in questions
        ]

    def texts(self, tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[str]:
        """What the model said, a prefilled <reasoning> put back in front: what rewards and graders read."""
        opening = self.answer_format.opening * self.prefill
        rows = zip(completions.ids, completions.mask, strict=True)
        return [opening + str(tokenizer.decode(ids[mask], skip_special_tokens=True)) for ids, mask in rows]


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

    def micro_batches(self, groups: int = 0) -> Iterator[tuple[PackedRows, slice]]:
        """Packed rows of `groups` questions at a time (0: all), and which of the B completions they are."""
        return micro_batches(self.prompts, self.completions, groups)


def micro_batches(
    prompts: Sequence[Tensor], completions: Completions, groups: int = 0
) -> Iterator[tuple[PackedRows, slice]]:
    """Packed rows of `groups` prompts at a time (0: all), and which of the B completions they are."""
    size = len(completions.ids) // len(prompts)
    for start in range(0, len(prompts), groups or len(prompts)):
        some = prompts[start : start + (groups or len(prompts))]
        part = slice(start * size, (start + len(some)) * size)
        yield pack(some, completions.ids[part], completions.mask[part], pad_id=HIDDEN_ID), part


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
    micro_groups: int,
) -> Rollout:
    """Rewards, advantages and reference log-probs of sampled completions."""
    group_size = len(texts) // len(questions)
    asked = [question for question in questions for _ in range(group_size)]
    rewards = score(texts, asked)
    device = completions.ids.device
    advantages = group_advantages(torch.tensor(rewards.total, device=device), group_size=group_size)
    ref_logprobs = torch.zeros(completions.mask.shape, device=device)
    if reference:
        for rows, part in micro_batches(prompts, completions, micro_groups):
            ref_logprobs[part] = reference(rows)
    return Rollout(questions, prompts, completions, texts, rewards, advantages, ref_logprobs)
