"""Tokens of the labels: by which token each label begins in a completion, and where a completion's answer begins.

The labels are a closed set, so the probabilities of their first tokens at that place are those of the answers.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from grpo_ds.core.expected_reward import LabelProbs
from grpo_ds.core.pick import NOWHERE
from grpo_ds.errors import UsageError
from grpo_ds.settings.config import TrainConfig
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.rewards import REASONING_GAIN
from grpo_ds.training.sampling import Completions


def label_ids_for(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[int, ...]:
    """Return the labels' tokens; () if they cannot be told apart and no reward needs them: auto is sampled then.

    Raises UsageError if one does.
    """
    try:
        return label_tokens(tokenizer, config.answer_format)
    except UsageError:
        if config.answer_reward == "expected" or REASONING_GAIN in map(str.strip, config.reward_funcs.split(",")):
            raise
        if config.answer_reward == "auto":
            say("Rewards are those of drawn answers: here the labels do not each begin with a token of their own.")
        return ()


def label_tokens(tokenizer: PreTrainedTokenizerBase, answer_format: AnswerFormat) -> tuple[int, ...]:
    """Return the first token of each label behind the answer tag; () unless the answer is a label.

    Raises UsageError if two labels begin with the same token, or one shares a token with the tag.
    """
    if not answer_format.is_closed:
        return ()
    first = {label: _first_token(tokenizer, answer_format, label) for label in answer_format.labels}
    alike = [label for label, id in first.items() if id is None or list(first.values()).count(id) > 1]
    if alike:
        raise UsageError(
            f"The probabilities of the labels cannot be read off one token: {', '.join(alike)} do not each begin\n"
            f"with a token of their own behind {answer_format.answer_pair[0]} in this model's tokenizer.\n"
            f"Use --answer_reward sampled and no {REASONING_GAIN}, or labels that begin differently."
        )
    return tuple(id for id in first.values() if id is not None)


def answer_place(ids: list[int], tokenizer: PreTrainedTokenizerBase, answer_format: AnswerFormat) -> int | None:
    """Return the index of the first token behind the answer tag that is not white space.

    None if there is none, or if a token holds the tag's end and more.
    """
    tag, low, high = answer_format.answer_pair[0], 0, len(ids) + 1
    while low < high:  # the shortest start of the completion that holds the tag
        middle = (low + high) // 2
        low, high = (low, middle) if tag in tokenizer.decode(ids[:middle]) else (middle + 1, high)
    if low > len(ids) or not str(tokenizer.decode(ids[:low])).endswith(tag):
        return None
    return next((t for t in range(low, len(ids)) if not str(tokenizer.decode(ids[t])).isspace()), None)


def label_probs(
    completions: Completions,
    texts: Sequence[str],
    right: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answer_format: AnswerFormat,
    label_ids: Sequence[int],
) -> LabelProbs | None:
    """Return the labels' probabilities where each completion answers; None if none were recorded.

    A completion has a place if it is well-formed and its answer begins with the first token of a label.

    texts: of the B completions, as rewards read them. right: the right label of each.
    """
    if completions.label_logprobs is None:
        return None
    device, places = completions.ids.device, []
    for ids, mask, text in zip(completions.ids.tolist(), completions.mask, texts, strict=True):
        well_formed = answer_format.parse(text).well_formed
        place = answer_place(ids[: int(mask.sum())], tokenizer, answer_format) if well_formed else None
        places.append(place if place is not None and ids[place] in label_ids else NOWHERE)
    at = torch.tensor(places, device=device)
    logprobs = completions.label_logprobs[torch.arange(len(at), device=device), at.clamp(min=0)]  # [B, n]
    return LabelProbs(
        at,
        torch.tensor(label_ids, device=device),
        logprobs.exp() * (at != NOWHERE)[:, None],
        torch.tensor([answer_format.labels.index(label) for label in right], device=device),
    )


def _first_token(tokenizer: PreTrainedTokenizerBase, answer_format: AnswerFormat, label: str) -> int | None:
    ids = tokenizer.encode(answer_format.write("word", label), add_special_tokens=False)
    place = answer_place(ids, tokenizer, answer_format)
    return None if place is None else ids[place]
