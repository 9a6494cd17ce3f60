"""Prompts: a question as chat messages, and as token ids within a length limit.

A context may hold "<|im_end|>" or any other control token as plain text. So the chat template is rendered with two
marks in place of the user's texts and cut at the marks. Only the template's pieces are tokenised with control tokens;
the user's texts are tokenised as text and put in between. To shorten a prompt, tokens of the context are dropped,
without rendering again (the chat itself: chat.py).
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_ds.errors import DataError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.chat import CONTEXT_MARK, QUESTION_MARK, TURN_MARK, Chat, Messages, render_chat
from grpo_ds.task.questions import Question
from grpo_ds.task.records import Unusable, sound_text
from grpo_ds.task.worked_examples import worked_examples

# Characters; twice Qwen's longest token, 128 spaces. A context is cut to this many characters for each token before it
# is tokenised, because tokenising 10 MB takes half a minute and 1.5 GB.
LONGEST_TOKEN = 256
FORM_PLACES = "in --system_prompt, or in the chats' own"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of a prompt, which the model continues.

    Example: a prompt for which the context was cut by 12 tokens (real ones have more ids).
        >>> EncodedPrompt(ids=[151644, 872, 198, 151645], text_tokens_dropped=12)
        EncodedPrompt(ids=[151644, 872, 198, 151645], text_tokens_dropped=12)
    """

    ids: list[int]  # at most max_prompt_length
    text_tokens_dropped: int  # tokens cut from the front of the context, without text that was cut before tokenising


def read_system_prompt(file: str) -> str:
    """Read the file of --system_prompt and check it like a text in --data. Raises Unusable with the reason."""
    if not os.path.isfile(file):
        raise Unusable("is not a file")
    try:
        return sound_text(Path(file).read_bytes().decode().replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise Unusable(reason) from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None


def build_messages(
    question: Question,
    *,
    answer_format: AnswerFormat,
    few_shot: int = 0,
    system_prompt: str | None = None,
    subject: str = "",
) -> Messages:
    """Build the chat: system prompt, `few_shot` worked examples as separate turns, the question.

    system_prompt: None: the default one; "": none. A chat of the data's own keeps its system prompt, if it has one, and
    gets no examples. subject: of the data, for the default prompt and the examples.
    """
    if system_prompt is None:
        system_prompt = default_system_prompt(answer_format, bool(question.context), subject)
    if question.messages:
        return [*_system_turn(question.messages, system_prompt), *map(dict, question.messages)]
    turns = _system_turn((), system_prompt)
    for example, reasoning in worked_examples(answer_format, subject)[:few_shot]:
        turns.append({"role": "user", "content": _user_text(example, answer_format)})
        turns.append({"role": "assistant", "content": answer_format.write(reasoning, example.label)})
    return [*turns, {"role": "user", "content": _user_text(question, answer_format)}]


def prompt_warnings(question: Question, *, answer_format: AnswerFormat, few_shot: int = 0, **how: Any) -> list[str]:
    """Say what the prompt of a question lacks: worked examples, for a chat gets none; tags that nothing asks for.

    how: of build_messages.
    """
    if answer_format.kind == "none":
        return []
    found = []
    if question.messages and few_shot:
        found.append(
            f"Warning: 0 of {few_shot} worked examples are in the prompt: records that are chats get none.\n"
            "A small model needs some to answer in form: write them into a prompt of your own (--system_prompt)."
        )
    turns = build_messages(question, answer_format=answer_format, few_shot=few_shot, **how)
    text = "\n".join(turn["content"] for turn in turns)
    tags = [tag for tag in (answer_format.reasoning_pair[0], answer_format.answer_pair[0]) if tag not in text]
    if tags:
        found.append(
            f"Warning: nothing in the prompt asks for {' or '.join(tags)}, and an answer without the tags earns "
            f"nothing.\nShow the form {FORM_PLACES}: {answer_format.write(*answer_format.placeholders)}"
        )
    return found


def _system_turn(messages: Sequence[Mapping[str, str]], system_prompt: str) -> Messages:
    """Return the system prompt as a turn; [] for none, or if the chat begins with its own."""
    own = messages and messages[0]["role"] == "system"
    return [{"role": "system", "content": system_prompt}] if system_prompt and not own else []


def marked_messages(*, answer_format: AnswerFormat, has_context: bool = True, **how: Any) -> Messages:
    """Build the chat of any question, with marks in place of its texts. how: of build_messages."""
    question = Question(id="", text=QUESTION_MARK, context=CONTEXT_MARK * has_context, label="")
    return build_messages(question, answer_format=answer_format, **how)


def default_system_prompt(answer_format: AnswerFormat, has_context: bool = True, subject: str = "") -> str:
    """The default instructions; "" if no answer is right: the task is then the data's own.

    A model that repeats the placeholders of the form earns nothing.
    """
    if answer_format.kind == "none":
        return ""
    how = {
        "labels": f"First reason briefly, then answer with {answer_format.wanted}.",
        "number": "First reason step by step, then answer with one number alone.",
        "text": "First reason briefly, then answer in as few words as possible.",
    }[answer_format.kind]
    questions, source = f"{subject} questions".strip(), " from the given context" * has_context
    form = answer_format.write(*answer_format.placeholders)
    return f"You answer {questions}{source}. {how} Reply in exactly this form:\n{form}"


def chat_of_any_question(tokenizer: Any, **how: Any) -> Chat:
    """Render the chat, once for all questions; after a change other than of chat_template forget_chats() first.

    how: of _rendered_chat.
    """
    return _rendered_chat(tokenizer, str(tokenizer.chat_template), **how)


@lru_cache(maxsize=16)
def _rendered_chat(
    tokenizer: Any,
    _template: str,
    *,
    answer_format: AnswerFormat,
    prefill: bool,
    roles: tuple[str, ...] = (),
    **how: Any,
) -> Chat:
    """roles: of the turns of a chat of the data's own, with marks in place of their texts. how: of build_messages."""
    if roles:
        turns = [{"role": role, "content": TURN_MARK.format(i)} for i, role in enumerate(roles[:-1])]
        chat = (*turns, {"role": roles[-1], "content": QUESTION_MARK})
        has_context = how.pop("has_context")
        question = Question("", "", CONTEXT_MARK * has_context, "", messages=chat)
        messages = build_messages(question, answer_format=answer_format, **how)
    else:
        messages = marked_messages(answer_format=answer_format, **how)
    return render_chat(tokenizer, messages, answer_format=answer_format, prefill=prefill)


forget_chats = _rendered_chat.cache_clear


def encode_prompt(
    tokenizer: Any,
    question: Question,
    *,
    answer_format: AnswerFormat,
    few_shot: int,
    prefill: bool,
    max_prompt_length: int,
    system_prompt: str | None = None,
    subject: str = "",
) -> EncodedPrompt:
    """Encode a prompt. If it is too long, the front of the context is cut: an abstract has its results at the end.

    prefill: end the prompt with an opening <reasoning> tag, which the completion continues.
    max_prompt_length: tokens.
    Raises DataError if the prompt does not fit even without any context; a chat of the data's own is never cut.
    """
    chat = chat_of_any_question(
        tokenizer,
        answer_format=answer_format,
        few_shot=few_shot,
        prefill=prefill,
        system_prompt=system_prompt,
        subject=subject,
        has_context=bool(question.context),
        roles=tuple(turn["role"] for turn in question.messages),
    )
    if question.messages:
        ids = _chat_ids(tokenizer, chat, [turn["content"] for turn in question.messages])
        if len(ids) > max_prompt_length:
            raise _too_long(question, len(ids), max_prompt_length)
        return EncodedPrompt(ids, 0)
    head, lead = _template_ids(tokenizer, chat.before), chat.lead
    reach = (max_prompt_length + 1) * LONGEST_TOKEN
    context = _text_ids(tokenizer, f"{lead}{question.context}"[-reach:]) if question.context else []
    middle = _template_ids(tokenizer, chat.between) + _text_ids(tokenizer, f"{lead}{question.text}")
    tail = _template_ids(tokenizer, chat.after)
    fixed = len(head) + len(middle) + len(tail)
    if fixed > max_prompt_length:
        raise _too_long(question, fixed, max_prompt_length)
    dropped = max(0, fixed + len(context) - max_prompt_length)
    return EncodedPrompt(head + context[dropped:] + middle + tail, dropped)


def _chat_ids(tokenizer: Any, chat: Chat, contents: Sequence[str]) -> list[int]:
    """Tokenise a chat of the data's own: its turns are a user's texts between the template's pieces."""
    pieces, ids = re.split(TURN_MARK.format("([0-9]+)"), chat.between), list[int]()
    for i, piece in enumerate(pieces):  # template, number of a turn, template, ...
        ids += _text_ids(tokenizer, contents[int(piece)]) if i % 2 else _template_ids(tokenizer, piece)
    return [*ids, *_text_ids(tokenizer, contents[-1]), *_template_ids(tokenizer, chat.after)]


def _user_text(question: Question, answer_format: AnswerFormat) -> str:
    """Return the user's turn; if no answer is right, the texts of the data alone."""
    heading = ("", "") if answer_format.kind == "none" else ("Context: ", "Question: ")
    context = f"{heading[0]}{question.context}\n\n" if question.context else ""
    return f"{context}{heading[1]}{question.text}"


def _template_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text of the template, in which control tokens are control tokens; a template adds BOS itself."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a user's text, in which control tokens (those the tokenizer calls special) are plain characters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _too_long(question: Question, needed: int, max_prompt_length: int) -> DataError:
    if not question.context:
        return DataError(
            f"Question {question.id} needs {needed} tokens, but --max_prompt_length is {max_prompt_length}.\n"
            f"Only a context is ever cut: raise --max_prompt_length to {needed}, or lower --few_shot."
        )
    return DataError(
        f"Question {question.id} needs {needed} tokens without any context, but --max_prompt_length is "
        f"{max_prompt_length}.\nThe question and the instructions are never cut: "
        f"raise --max_prompt_length to {needed} plus room for the context, or lower --few_shot."
    )
