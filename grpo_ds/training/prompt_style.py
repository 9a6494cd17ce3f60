"""The form of prompts, and the text of completions that rewards and grades read.

Training, evaluation and `ask` all use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_ds.settings.config import AskConfig
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.chat import Messages, check_chat_template
from grpo_ds.task.prompts import build_messages, chat_of_any_question, encode_prompt, forget_chats, marked_messages
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import Prompt
from grpo_ds.training.label_tokens import answer_place
from grpo_ds.training.sampling import Completions


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """The settings of a prompt.

    Example:
        style = PromptStyle(AnswerFormat(("yes", "no")), few_shot=0, prefill=False, max_prompt_length=768)
        style.encode(tokenizer, questions)  # [[151644, 8948, ...], ...], a list of token ids for each question
    """

    answer_format: AnswerFormat
    few_shot: int  # worked examples
    prefill: bool  # the prompt ends with the opening reasoning tag, also if the chat template does not open it
    max_prompt_length: int  # tokens
    system_prompt: str | None = None  # None: our own; "": none
    subject: str = ""  # of the questions, for our own prompt and examples

    def check(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Return warnings about the tokenizer's chat template. Raises UsageError if it cannot be used."""
        return check_chat_template(tokenizer, self.messages(), answer_format=self.answer_format)

    def messages(self) -> Messages:
        """The chat of any question with a context."""
        return marked_messages(**self.how())

    def encode(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of each question's prompt. Raises DataError if a question alone is too long for a prompt."""
        return [_prompt_ids(tokenizer, question, self) for question in questions]

    def shown(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Prompt]:
        """Prompt of each question as reward functions get it; questions that repeat are rendered once."""
        made = {question: self._prompt(tokenizer, question) for question in dict.fromkeys(questions)}
        return [made[question] for question in questions]

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> Prompt:
        messages = build_messages(question, **self.how())
        return Prompt(str(tokenizer.decode(_prompt_ids(tokenizer, question, self))), messages)

    def how(self) -> dict[str, Any]:
        """Arguments that all functions of task/prompts.py take."""
        names = ("answer_format", "few_shot", "system_prompt", "subject")
        return {name: getattr(self, name) for name in names}

    def encode_again(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[list[int]]:
        """Encode prompts whose template text has changed since they were encoded."""
        forget_prompts()
        return self.encode(tokenizer, questions)

    def texts(self, tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[str]:
        """Text of each completion as rewards and grades read it, after the reasoning tag that its prompt opened."""
        opening = _opening(tokenizer, self)
        rows = zip(completions.ids, completions.mask, strict=True)
        return [opening + _decode(tokenizer, ids[mask]) for ids, mask in rows]

    def up_to_answer(self, tokenizer: PreTrainedTokenizerBase, reasoning: str) -> list[int]:
        """Token ids between a prompt and an answer behind this reasoning; "" for the tags alone."""
        form, opened = self.answer_format, _opening(tokenizer, self)
        text = ("" if opened else form.opening) + reasoning + form.reasoning_pair[1] + form.answer_pair[0]
        return tokenizer.encode(text, add_special_tokens=False)

    def answer_places(self, tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[int | None]:
        """Return the index of each completion's first answer token; None unless it keeps to the form up to there."""
        opening = _opening(tokenizer, self)
        rows = [ids[mask].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)]
        return [self._answer_place(tokenizer, opening, ids) for ids in rows]

    def _answer_place(self, tokenizer: PreTrainedTokenizerBase, opening: str, ids: list[int]) -> int | None:
        form, place = self.answer_format, answer_place(ids, tokenizer, self.answer_format)
        if place is None:
            return None
        begun = opening + str(tokenizer.decode(ids[:place]))
        return place if form.parse(begun + form.labels[0] + form.stop).well_formed else None


def prompt_style(config: AskConfig) -> PromptStyle:
    """Return the style that this config asks for."""
    return PromptStyle(
        config.answer_format,
        config.few_shot,
        config.prefill,
        config.max_prompt_length,
        config.system_prompt_text,
        config.subject or "",
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " C"]) -> str:
    """Text of a completion without its final EOS.

    Any other control token stays: without it, an answer that contains one would look right and be rewarded.
    """
    ends_in_control = len(ids) > 0 and not tokenizer.decode(ids[-1:], skip_special_tokens=True)
    return str(tokenizer.decode(ids[:-1] if ends_in_control else ids, skip_special_tokens=False))


def _opening(tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> str:
    """Reasoning tag at the end of every prompt, put there by --prefill or by the chat template; "" without one."""
    chat = chat_of_any_question(tokenizer, **style.how(), prefill=style.prefill, has_context=True)
    return chat.opening(style.answer_format)


@lru_cache(maxsize=20_000)  # a run checks all prompts before its first step and asks each again every epoch
def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question, style: PromptStyle) -> list[int]:
    return encode_prompt(
        tokenizer, question, **style.how(), prefill=style.prefill, max_prompt_length=style.max_prompt_length
    ).ids


def forget_prompts() -> None:
    """Drop the prompts and chats that are kept, with their tokenizers: at the end of a run, or to render them again."""
    _prompt_ids.cache_clear()
    forget_chats()
