"""Prompts: a question as chat messages, and as token ids within a length limit.

A context may hold "<|im_end|>" or any other control token as plain text. So the chat template is rendered with two
marks in place of the user's texts and cut at the marks. Only the template's pieces are tokenised with control tokens;
the user's texts are tokenised as text and put in between. To shorten a prompt, tokens of the context are dropped,
without rendering again (the chat itself: chat.py).
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_ds.errors import DataError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.chat import CONTEXT_MARK, QUESTION_MARK, Chat, Messages, render_chat
from grpo_ds.task.questions import Question
from grpo_ds.task.records import Unusable, sound_text

# Characters; twice Qwen's longest token, 128 spaces. A context is cut to this many characters for each token before it
# is tokenised, because tokenising 10 MB takes half a minute and 1.5 GB.
LONGEST_TOKEN = 256

WORKED_EXAMPLES = (
    (
        Question(
            id="worked-example-yes",
            text="Does hand washing by ward staff reduce the spread of intestinal infections?",
            context="Two wards were compared for a year. The ward with a hand-washing programme had 4 infections "
            "in 400 patients, the other 21 in 410 (p < 0.01).",
            label="yes",
        ),
        "Infections were five times rarer in the ward with the programme, and the difference is significant.",
    ),
    (
        Question(
            id="worked-example-no",
            text="Does an evening glass of water shorten the common cold?",
            context="In a trial of 300 adults, colds lasted 7.1 days with an evening glass of water and 7.0 days "
            "without it (p = 0.81).",
            label="no",
        ),
        "The colds lasted equally long in both groups, and the difference is not significant.",
    ),
)


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


def worked_examples(answer_format: AnswerFormat) -> list[tuple[Question, str]]:
    """Worked examples (question, reasoning) whose answer is one of the labels, spelled as the labels are."""
    spelled = [(replace(q, label=answer_format.label_of(q.label) or ""), reasoning) for q, reasoning in WORKED_EXAMPLES]
    return [example for example in spelled if example[0].label]


def build_messages(
    question: Question, *, answer_format: AnswerFormat, few_shot: int, system_prompt: str = ""
) -> Messages:
    """Build the chat: system prompt ("": the default), `few_shot` worked examples as separate turns, the question."""
    turns = [
        {"role": "system", "content": system_prompt or default_system_prompt(answer_format, bool(question.context))}
    ]
    for example, reasoning in worked_examples(answer_format)[:few_shot]:
        turns.append({"role": "user", "content": _user_text(example)})
        turns.append({"role": "assistant", "content": answer_format.write(reasoning, example.label)})
    return [*turns, {"role": "user", "content": _user_text(question)}]


def marked_messages(
    *, answer_format: AnswerFormat, few_shot: int, system_prompt: str, has_context: bool = True
) -> Messages:
    """Build the chat of any question, with marks in place of its texts."""
    question = Question(id="", text=QUESTION_MARK, context=CONTEXT_MARK * has_context, label="")
    return build_messages(question, answer_format=answer_format, few_shot=few_shot, system_prompt=system_prompt)


def default_system_prompt(answer_format: AnswerFormat, has_context: bool = True) -> str:
    """The default instructions. A model that repeats their placeholders ("...", "yes|no") earns nothing."""
    labels, source = answer_format.labels, " from the given context" * has_context
    return (
        f"You answer biomedical questions{source}. First reason briefly, then answer with "
        f"{' or '.join(labels)}. Reply in exactly this form:\n{answer_format.write('...', '|'.join(labels))}"
    )


def chat_of_any_question(
    tokenizer: Any, *, answer_format: AnswerFormat, few_shot: int, prefill: bool, system_prompt: str, has_context: bool
) -> Chat:
    """Render the chat, once for all questions; after a change other than of chat_template forget_chats() first."""
    settings = (answer_format, few_shot, prefill, system_prompt, has_context)
    return _rendered_chat(tokenizer, str(tokenizer.chat_template), *settings)


@lru_cache(maxsize=16)
def _rendered_chat(
    tokenizer: Any, _template: str, answer_format: AnswerFormat, few_shot: int, prefill: bool, system: str, has: bool
) -> Chat:
    messages = marked_messages(answer_format=answer_format, few_shot=few_shot, system_prompt=system, has_context=has)
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
    system_prompt: str = "",
) -> EncodedPrompt:
    """Encode a prompt. If it is too long, the front of the context is cut: an abstract has its results at the end.

    prefill: end the prompt with an opening <reasoning> tag, which the completion continues.
    max_prompt_length: tokens.
    Raises DataError if the prompt does not fit even without any context.
    """
    chat = chat_of_any_question(
        tokenizer,
        answer_format=answer_format,
        few_shot=few_shot,
        prefill=prefill,
        system_prompt=system_prompt,
        has_context=bool(question.context),
    )
    head = _template_ids(tokenizer, chat.before)
    reach = (max_prompt_length + 1) * LONGEST_TOKEN
    context = _text_ids(tokenizer, f" {question.context}"[-reach:]) if question.context else []
    middle = _template_ids(tokenizer, chat.between) + _text_ids(tokenizer, f" {question.text}")
    tail = _template_ids(tokenizer, chat.after)
    fixed = len(head) + len(middle) + len(tail)
    if fixed > max_prompt_length:
        raise _too_long(question, fixed, max_prompt_length)
    dropped = max(0, fixed + len(context) - max_prompt_length)
    return EncodedPrompt(head + context[dropped:] + middle + tail, dropped)


def _user_text(question: Question) -> str:
    return f"Context: {question.context}\n\n" * bool(question.context) + f"Question: {question.text}"


def _template_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text of the template, in which control tokens are control tokens; a template adds BOS itself."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a user's text, in which control tokens (those the tokenizer calls special) are plain characters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _too_long(question: Question, needed: int, max_prompt_length: int) -> DataError:
    return DataError(
        f"Question {question.id} needs {needed} tokens without any context, but --max_prompt_length is "
        f"{max_prompt_length}.\nThe question and the instructions are never cut: "
        f"raise --max_prompt_length to {needed} plus room for the context, or lower --few_shot."
    )
