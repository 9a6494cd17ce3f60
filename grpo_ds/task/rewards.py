"""Ready-made reward functions, and the signature that they share with a user's own functions (docs/rewards.md).

As in TRL, a reward function takes keyword arguments: `completions`, and each column of the data under its field's name
in the record. All are lists of length B, in which a group's record is repeated G times; `id`, `question`, `context`
and `label` are always there. It returns one float for each completion, or None if it does not apply.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_ds.task.answers import AnswerFormat

Messages = list[dict[str, str]]  # a chat: [{"role": "user", "content": "..."}, ...]
RewardFunction = Callable[..., Sequence[float | None]]
WeightedFunctions = Mapping[str, tuple[RewardFunction, float]]  # name in metrics -> function, weight
ARGUMENTS = ("completions", "prompts", "completion_ids", "trainer_state", "log_extra", "log_metric")  # TRL's
OF_SAMPLING = {"prompts", "completion_ids", "trainer_state"}  # made only for a function that takes one
COLUMNS = ("id", "question", "context", "label")  # of every question; with ARGUMENTS they hide fields of these names
ACCEPTED = "accepted"  # a column of questions whose answer is a text: all right ones
CORRECTNESS, REASONING_GAIN, BARE_LABEL = "correctness", "reasoning_gain", "bare_label"
READY_MADE = (CORRECTNESS, "format", "length_penalty", "repetition_penalty", BARE_LABEL, REASONING_GAIN)
OVERLONG = "overlong"  # name of the penalty that --overlong_buffer adds to the rewards
CHARACTERS_PER_TOKEN = 4  # roughly, for English and a vocabulary of 50,000 or more
NGRAM = 3  # words


class Prompt(NamedTuple):
    """A prompt in the two forms in which a reward function may get it."""

    text: str  # as the model reads it, rendered and cut
    messages: Messages


@dataclass(frozen=True, slots=True)
class OwnReward:
    """A user's function, with the arguments that it takes and the form of its completions and prompts.

    Example:
        >>> reward = OwnReward(lambda completions: [float(len(it)) for it in completions], frozenset({"completions"}))
        >>> reward(completions=["abc"], id=["17"])
        [3.0]
    """

    function: Callable[..., Any]
    takes: frozenset[str] | None = None  # None: everything
    messages: bool = False  # completions and prompts are lists of messages, not texts

    @property
    def needs_sampling(self) -> bool:
        return self.takes is None or not self.takes.isdisjoint(OF_SAMPLING)

    def __call__(self, **arguments: Any) -> Any:
        return self.function(**{name: it for name, it in arguments.items() if self.takes is None or name in self.takes})


def correctness(
    completions: Sequence[str],
    label: Sequence[str],
    *,
    answer_format: AnswerFormat,
    accepted: Sequence[Sequence[str]] | None = None,
    reward: float = 1.0,
    **_: object,
) -> list[float]:
    """Give `reward` to a completion that satisfies the answer contract with a right answer, else 0.

    accepted: all right answers of each question; None: its label alone.
    """
    right = accepted or [(it,) for it in label]
    pairs = zip(completions, right, strict=True)
    return [reward * answer_format.is_right(answer_format.parse(text).answer, answers) for text, answers in pairs]


def tag_pairs(
    completions: Sequence[str], *, answer_format: AnswerFormat, reward: float = 1.0, **_: object
) -> list[float]:
    """Give `reward` for each of the two tag pairs that is well-formed, for a right or a wrong answer."""
    parsed = [answer_format.parse(completion) for completion in completions]
    return [reward * (answer.reasoning_tags + answer.answer_tags) for answer in parsed]


def length_penalty(completions: Sequence[str], *, full_length: int, **_: object) -> list[float]:
    """-(characters / full_length), at least -1: every character costs the same, up to `full_length` characters.

    It counts characters, because a text without spaces has few words and would cost nothing.
    """
    return [-min(1.0, len(completion) / full_length) for completion in completions]


def repetition_penalty(completions: Sequence[str], **_: object) -> list[float]:
    """-(1 - distinct / all) over the completion's 3-grams of words, ignoring case; 0 below three words.

    Demystifying Long Chain-of-Thought Reasoning (Yeo et al. 2025), appendix C.2, on words instead of tokens.
    """
    return [_repetition(completion.casefold().split()) for completion in completions]


def bare_label(completions: Sequence[str], *, answer_format: AnswerFormat, **_: object) -> list[float]:
    """-1 for a completion whose reasoning is nothing but labels, in any case and punctuation: "Yes." or "yes, no".

    A small model soon writes its answer twice, as no other reward pays for reasoning.
    """
    labels = _words(" ".join(answer_format.labels))
    bare = [_words(answer_format.split(completion)[0]) <= labels for completion in completions]
    return [0.0 - is_bare for is_bare in bare]  # 0.0, not -0.0


def reasoning_gain(completions: Sequence[str], **_: object) -> list[None]:
    """The probability of the right label behind the completion's reasoning, less that behind an empty reasoning.

    No text tells it: the trainer puts the values in (training/collect.py); None where it does not know them.
    """
    return [None] * len(completions)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _repetition(words: list[str]) -> float:
    ngrams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def _with_options(function: RewardFunction, **options: object) -> RewardFunction:
    """Bind options that no column of the same name can replace (with functools.partial, the column would win)."""

    def reward(**columns: object) -> Sequence[float | None]:
        return function(**{**columns, **options})

    return reward


def ready_made(
    *,
    answer_format: AnswerFormat,
    correctness_reward: float = 2.0,
    format_reward: float = 0.2,
    max_completion_length: int = 300,
) -> dict[str, RewardFunction]:
    """Return every function of READY_MADE by name.

    correctness_reward, format_reward: rewards for a right answer and for each well-formed tag pair.
    max_completion_length: tokens; the length penalty reaches -1 at about this length.
    """
    return {
        CORRECTNESS: _with_options(correctness, answer_format=answer_format, reward=correctness_reward),
        "format": _with_options(tag_pairs, answer_format=answer_format, reward=format_reward),
        "length_penalty": _with_options(length_penalty, full_length=CHARACTERS_PER_TOKEN * max_completion_length),
        "repetition_penalty": repetition_penalty,
        REASONING_GAIN: reasoning_gain,
        BARE_LABEL: _with_options(bare_label, answer_format=answer_format),
    }
