"""Tokens of the labels, and where a completion's answer begins."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_ds.errors import UsageError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.training.label_tokens import answer_place, label_tokens

FORMAT = AnswerFormat()


def merging(*merges):
    """Byte-level BPE with these merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: id for id, piece in enumerate([*alphabet, *(first + second for first, second in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_each_label_begins_with_its_first_byte(tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(label_tokens(tokenizer, FORMAT))) == ["y", "n"]


def test_a_labels_first_token_is_the_one_behind_the_tag_not_that_of_the_label_alone():
    tokenizer = merging(("e", "s"), ("y", "es"))
    assert tokenizer.convert_ids_to_tokens(list(label_tokens(tokenizer, FORMAT))) == ["yes", "n"]


@pytest.mark.parametrize(
    "labels, merges",
    [(("yes", "yellow"), ()), (("no", "maybe", "more"), ()), (("yes", "no"), ((">", "n"),))],
    ids=["the same byte", "two of three", "merged with the tag"],
)
def test_labels_that_no_token_tells_apart_are_refused(labels, merges):
    with pytest.raises(UsageError, match="--answer_reward sampled") as refused:
        label_tokens(merging(*merges), AnswerFormat(labels=labels))
    assert labels[-1] in str(refused.value)


@pytest.mark.parametrize(
    "text, behind",
    [
        ("<reasoning>so</reasoning><answer>yes</answer>", "<reasoning>so</reasoning><answer>"),
        ("<reasoning>so</reasoning>\n<answer>\n no</answer>", "<reasoning>so</reasoning>\n<answer>\n "),
        ("<reasoning>so</reasoning><answer>", None),
        ("<reasoning>so</reasoning><answer> ", None),
        ("yes", None),
        ("", None),
    ],
)
def test_the_answer_begins_at_the_first_token_behind_the_tag_that_is_not_space(tokenizer, text, behind):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert answer_place(ids, tokenizer, FORMAT) == (None if behind is None else len(behind))


def test_a_token_that_ends_the_tag_and_begins_the_answer_has_no_place():
    tokenizer = merging((">", "y"))
    assert answer_place(tokenizer.encode("<answer>yes</answer>"), tokenizer, FORMAT) is None
    assert answer_place(tokenizer.encode("<answer>no</answer>"), tokenizer, FORMAT) == len("<answer>")
