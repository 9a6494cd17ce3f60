"""Tokens of the labels: by which token each label begins in a completion, and where a completion's answer begins.

The labels are a closed set, so the probabilities of their first tokens at that place are those of the answers.
"""

from transformers import PreTrainedTokenizerBase

from grpo_ds.errors import UsageError
from grpo_ds.task.answers import AnswerFormat


def label_tokens(tokenizer: PreTrainedTokenizerBase, answer_format: AnswerFormat) -> tuple[int, ...]:
    """Return the first token of each label behind the answer tag.

    Raises UsageError if two labels begin with the same token, or one shares a token with the tag.
    """
    first = {label: _first_token(tokenizer, answer_format, label) for label in answer_format.labels}
    alike = [label for label, id in first.items() if id is None or list(first.values()).count(id) > 1]
    if alike:
        raise UsageError(
            f"The probabilities of the labels cannot be read off one token: {', '.join(alike)} do not each begin\n"
            f"with a token of their own behind {answer_format.answer_pair[0]} in this model's tokenizer.\n"
            "Use --answer_reward sampled, or labels that begin differently."
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


def _first_token(tokenizer: PreTrainedTokenizerBase, answer_format: AnswerFormat, label: str) -> int | None:
    ids = tokenizer.encode(answer_format.write("word", label), add_special_tokens=False)
    place = answer_place(ids, tokenizer, answer_format)
    return None if place is None else ids[place]
