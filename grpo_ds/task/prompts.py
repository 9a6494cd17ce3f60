"""Prompts: a question as chat messages, and as token ids within a budget.

A context may hold "<|im_end|>" or any other control token as plain text. So the chat template is rendered
around two marks, cut there, and only its own pieces are tokenised with control tokens; the user's pieces are
tokenised as text and put in between. Shortening then is dropping tokens of the context, with no re-rendering.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_ds.errors import DataError, UsageError
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.records import Unusable, sound_text

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Private-use characters, which no chat template has reason to hold or to strip.
CONTEXT_MARK = "\ue000context\ue001"
QUESTION_MARK = "\ue000question\ue001"
# Characters, twice Qwen's 128 spaces. What of a context lies further back than this for every token is cut anyway, and
# tokenising 10 MB takes half a minute and 1.5 GB.
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
    """A prompt ready to be continued by the model."""

    ids: list[int]  # at most max_prompt_length
    text_tokens_dropped: int  # tokens cut from the front of the context, or of as much of it as could matter


def read_system_prompt(file: str) -> str:
    """The text of --system_prompt, read and checked like a text of --data. Raises Unusable, which says what it is."""
    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise Unusable("is no file with a text in it")
    try:
        return sound_text(path.read_bytes().decode().replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise Unusable(reason) from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None


def worked_examples(answer_format: AnswerFormat) -> list[tuple[Question, str]]:
    """Questions that a label answers, with their reasoning, in the labels' spelling."""
    spelled = [(replace(q, label=answer_format.label_of(q.label) or ""), reasoning) for q, reasoning in WORKED_EXAMPLES]
    return [example for example in spelled if example[0].label]


def build_messages(
    question: Question, *, answer_format: AnswerFormat, few_shot: int, system_prompt: str = ""
) -> list[dict[str, str]]:
    """System prompt ("": our own), `few_shot` worked examples as turns of their own, then the question."""
    turns = [
        {"role": "system", "content": system_prompt or default_system_prompt(answer_format, bool(question.context))}
    ]
    for example, reasoning in worked_examples(answer_format)[:few_shot]:
        turns.append({"role": "user", "content": _user_text(example)})
        turns.append({"role": "assistant", "content": answer_format.write(reasoning, example.label)})
    return [*turns, {"role": "user", "content": _user_text(question)}]


def default_system_prompt(answer_format: AnswerFormat, has_context: bool = True) -> str:
    """What is asked for; its placeholders ("...", "yes|no") earn nothing when they are repeated."""
    labels, source = answer_format.labels, " from the given context" * has_context
    return (
        f"You answer biomedical questions{source}. First reason briefly, then answer with "
        f"{' or '.join(labels)}. Reply in exactly this form:\n{answer_format.write('...', '|'.join(labels))}"
    )


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
    """Token ids of a prompt; the context loses its front to fit, as an abstract's results stand at its end.

    prefill: the prompt ends with an opened <reasoning>, which the completion continues.
    Raises DataError where not even the question fits.
    """
    marked = replace(question, text=QUESTION_MARK, context=CONTEXT_MARK if question.context else "")
    messages = build_messages(marked, answer_format=answer_format, few_shot=few_shot, system_prompt=system_prompt)
    before, between, after = _cut_at_marks(_render(tokenizer, messages), bool(question.context))
    head = _template_ids(tokenizer, before)
    reach = (max_prompt_length + 1) * LONGEST_TOKEN
    context = _text_ids(tokenizer, f" {question.context}"[-reach:]) if question.context else []
    middle = _template_ids(tokenizer, between) + _text_ids(tokenizer, f" {question.text}")
    tail = _template_ids(tokenizer, after + answer_format.opening * prefill)
    fixed = len(head) + len(middle) + len(tail)
    if fixed > max_prompt_length:
        raise _too_long(question, fixed, max_prompt_length)
    dropped = max(0, fixed + len(context) - max_prompt_length)
    return EncodedPrompt(head + context[dropped:] + middle + tail, dropped)


def ensure_chat_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the plain default, behind BOS where it starts texts with one."""
    if tokenizer.chat_template:
        return
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * starts_with_bos + DEFAULT_CHAT_TEMPLATE


def _user_text(question: Question) -> str:
    return f"Context: {question.context}\n\n" * bool(question.context) + f"Question: {question.text}"


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The chat as text, its system prompt in the first user turn where the template refuses or ignores that role."""
    try:
        rendered = _apply_template(tokenizer, messages)
    except Exception:  # the template engine's own; any other fault is raised again just below
        return _apply_template(tokenizer, _without_system_role(messages))
    if messages[0]["content"] in rendered:
        return rendered
    return _apply_template(tokenizer, _without_system_role(messages))


def _apply_template(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _without_system_role(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    system, first, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]


def _cut_at_marks(rendered: str, has_context: bool) -> tuple[str, str, str]:
    """The template's text before the context ("" without one), between context and question, and after.

    The space before a mark goes to the user's text: tokenizers join a word with the space before it.
    """
    mark = f" {CONTEXT_MARK}"
    # The last of each: a system prompt before them may hold any text.
    rest, found_question, after = rendered.rpartition(f" {QUESTION_MARK}")
    before, found_context, between = rest.rpartition(mark) if has_context else ("", mark, rest)
    if not (found_context and found_question):
        raise UsageError(
            "The tokenizer's chat template does not repeat the last user turn as it stands, so no question can be put "
            "into it.\nUse an instruction-tuned model, or mend chat_template in its tokenizer_config.json."
        )
    return before, between, after


def _template_ids(tokenizer: Any, text: str) -> list[int]:
    """Our own text: control tokens are control tokens; the template holds BOS if it wants it."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """A user's text: control tokens are spelled out (all that the tokenizer calls special)."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _too_long(question: Question, needed: int, max_prompt_length: int) -> DataError:
    return DataError(
        f"Question {question.id} needs {needed} tokens without any context, but --max_prompt_length is "
        f"{max_prompt_length}.\nThe question and the instructions are never cut: "
        f"raise --max_prompt_length to {needed} and room for the context, or lower --few_shot."
    )
