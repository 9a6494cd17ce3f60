"""Prompts: a question as chat messages, and as token ids within a length limit.

A context may hold "<|im_end|>" or any other control token as plain text. So the chat template is rendered with two
marks in place of the user's texts and cut at the marks. Only the template's pieces are tokenised with control tokens;
the user's texts are tokenised as text and put in between. To shorten a prompt, tokens of the context are dropped,
without rendering again.

A template may edit what it is given: it refuses the system role, removes the reasoning from earlier turns, or begins
the assistant's turn itself. So the rendered chat is compared with the messages (`render_chat`), and what the template
would lose stands in the user's turn instead.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_ds.errors import DataError, UsageError
from grpo_ds.task.answers import CONTROL, TAG_NAME, AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.records import Unusable, sound_text

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Private-use characters: no chat template has a reason to contain or remove them.
CONTEXT_MARK = "\ue000context\ue001"
QUESTION_MARK = "\ue000question\ue001"
# Characters; twice Qwen's longest token, 128 spaces. A context is cut to this many characters for each token before it
# is tokenised, because tokenising 10 MB takes half a minute and 1.5 GB.
LONGEST_TOKEN = 256
TAG_AT_END = re.compile(rf"<(/?)({TAG_NAME.pattern})>\s*\Z", re.ASCII)
LONGEST_REASON = 160  # characters of a template's own error
NO_SYSTEM_ROLE = "The chat template has no place for a system prompt: the instructions begin the first user turn."
EDITS_TURNS = "The chat template edits earlier assistant turns: the worked examples are text of the user's turn."
FIX_TEMPLATE = "Use an instruction-tuned model, or fix chat_template in its tokenizer_config.json."
Messages = list[dict[str, str]]

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
class Chat:
    """The rendered chat of a question, cut at the user's texts.

    Example: a template that opens the reasoning itself, as those of models that always reason do.
        >>> end = "<|im_end|>\\n<|im_start|>assistant\\n<think>\\n"
        >>> Chat("<|im_start|>user\\nContext:", "\\n\\nQuestion:", end).opening(AnswerFormat(reasoning_tag="think"))
        '<think>\\n'
    """

    before: str  # the template's text before the context; "" without one
    between: str  # between context and question
    after: str  # from the question to the completion: end of the turn, the assistant's header, a prefilled tag
    notes: tuple[str, ...] = ()  # what the template would have edited, and where it stands now

    def opening(self, answer_format: AnswerFormat) -> str:
        """Return the reasoning that the completion continues, from its tag on; "" if the tag is not open.

        It is a part of the prompt, put there by the template or by --prefill, and a part of the answer.
        """
        opened, closed = answer_format.reasoning_pair
        _, tag, begun = self.after.rpartition(opened)
        return tag + begun if tag and closed not in begun else ""


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
    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise Unusable("is not a file")
    try:
        return sound_text(path.read_bytes().decode().replace("\r\n", "\n").replace("\r", "\n"))
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


def default_system_prompt(answer_format: AnswerFormat, has_context: bool = True) -> str:
    """The default instructions. A model that repeats their placeholders ("...", "yes|no") earns nothing."""
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
    """Encode a prompt. If it is too long, the front of the context is cut: an abstract has its results at the end.

    prefill: end the prompt with an opening <reasoning> tag, which the completion continues.
    max_prompt_length: tokens.
    Raises DataError if the prompt does not fit even without any context.
    """
    chat = render_chat(
        tokenizer,
        has_context=bool(question.context),
        answer_format=answer_format,
        few_shot=few_shot,
        prefill=prefill,
        system_prompt=system_prompt,
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


def render_chat(
    tokenizer: Any, *, has_context: bool, answer_format: AnswerFormat, few_shot: int, prefill: bool, system_prompt: str
) -> Chat:
    """Render the chat of any question, in the first arrangement that the template repeats unchanged.

    Raises UsageError for a template that loses the question or the instructions in every arrangement, or fails.
    """
    question = Question(id="", text=QUESTION_MARK, context=CONTEXT_MARK * has_context, label="")
    messages = build_messages(question, answer_format=answer_format, few_shot=few_shot, system_prompt=system_prompt)
    fault = ""
    for arranged, notes in _arrangements(messages):
        try:
            rendered = _apply_template(tokenizer, arranged)
        except Exception as error:  # a template raises what it likes, for a role or for roles that do not alternate
            fault = fault or f"fails: {' '.join(str(error).split())[:LONGEST_REASON]}"
            continue
        if _repeats(rendered, arranged):
            chat = Chat(*_cut_at_marks(rendered, has_context), notes)
            tag = answer_format.opening * (prefill and not chat.opening(answer_format))
            return replace(chat, after=chat.after + tag)
        fault = "does not repeat the last user turn unchanged, so no question can be put into it"
    raise UsageError(f"The tokenizer's chat template {fault}.\n{FIX_TEMPLATE}")


def check_chat_template(
    tokenizer: Any, *, answer_format: AnswerFormat, few_shot: int, system_prompt: str
) -> tuple[str, ...]:
    """Return warnings about the template, one line each. Raises UsageError if no completion after it could be read."""
    options: dict[str, Any] = {"answer_format": answer_format, "few_shot": few_shot, "system_prompt": system_prompt}
    chat, own = render_chat(tokenizer, has_context=True, prefill=False, **options), answer_format.reasoning_tag
    header = _assistant_header(tokenizer)
    left = header[len(os.path.commonprefix([header, chat.after])) :]  # noqa: RUF071  characters, not folders
    if re.search(CONTROL, left):
        raise UsageError(
            f"The chat template begins an assistant's turn with {left.strip()!r}, but its generation prompt does not,\n"
            "and a completion with control tokens in front of the answer earns nothing.\n"
            "Add that text to the generation prompt: chat_template in the model's tokenizer_config.json."
        )
    tag = TAG_AT_END.search(chat.after)
    closes, name = (bool(tag[1]), tag[2]) if tag else (False, own)
    if closes and name == own:
        closed = f"The chat template closes <{own}> before the completion, so the model may not reason in it."
        return (*chat.notes, f"{closed} Try another --reasoning_tag.")
    # A header that ends in a tag, such as <bot>, opens nothing.
    if not closes and name != own and not header.rstrip().endswith(f"<{name}>"):
        raise UsageError(
            f"The chat template opens <{name}> at the end of every prompt, but the reasoning tag is <{own}>:\n"
            f"a completion would continue <{name}>, and an answer behind it earns nothing.\n"
            f"Try --reasoning_tag {name}, or change the generation prompt in chat_template (tokenizer_config.json)."
        )
    return chat.notes


def ensure_chat_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the default one, after BOS if the tokenizer starts texts with BOS."""
    if tokenizer.chat_template:
        return
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * starts_with_bos + DEFAULT_CHAT_TEMPLATE


def _user_text(question: Question) -> str:
    return f"Context: {question.context}\n\n" * bool(question.context) + f"Question: {question.text}"


def _arrangements(messages: Messages) -> Iterator[tuple[Messages, tuple[str, ...]]]:
    """Yield the chat and notes on it: unchanged, then with instructions and examples as text of the user's turn."""
    system, *turns = messages
    yield messages, ()
    yield _without_system_role(messages), (NO_SYSTEM_ROLE,)
    if len(turns) > 1:
        alone = [system, {"role": "user", "content": _examples_as_text(turns)}]
        yield alone, (EDITS_TURNS,)
        yield _without_system_role(alone), (NO_SYSTEM_ROLE, EDITS_TURNS)


def _without_system_role(messages: Messages) -> Messages:
    system, first, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]


def _examples_as_text(turns: Messages) -> str:
    """Return the last user turn with the turns before it as examples in front."""
    shown = {"user": "Example:\n\n{}", "assistant": "Reply:\n\n{}"}
    examples = [shown[turn["role"]].format(turn["content"]) for turn in turns[:-1]]
    return "\n\n".join([*examples, "Now reply to this:", turns[-1]["content"]])


def _repeats(rendered: str, messages: Messages) -> bool:
    """Return True if the template repeats every text, and earlier assistant turns begin as the completion will."""
    place, headers = 0, []
    for message in messages:
        if message["role"] == "system":  # some templates put it before the last user turn
            if message["content"] not in rendered:
                return False
            continue
        start = rendered.find(message["content"], place)
        if start < 0:
            return False
        if message["role"] == "assistant":
            headers.append(rendered[place:start].rstrip())
        place = start + len(message["content"])
    return all(rendered[place:].startswith(header) for header in headers)


def _assistant_header(tokenizer: Any) -> str:
    """Return the template's text between a user's turn and the answer; "" if it loses earlier turns."""
    texts = {"user": QUESTION_MARK, "assistant": CONTEXT_MARK}
    chat = [{"role": role, "content": texts[role]} for role in ("user", "assistant", "user")]
    try:
        rendered = _apply_template(tokenizer, chat)
    except Exception:  # a template raises what it likes
        return ""
    header, found, _ = rendered.partition(QUESTION_MARK)[2].partition(CONTEXT_MARK)
    return header if found else ""


def _apply_template(tokenizer: Any, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _cut_at_marks(rendered: str, has_context: bool) -> tuple[str, str, str]:
    """Return the template's text before the context ("" without one), between context and question, and after.

    The space before a mark belongs to the user's text, because tokenizers join a word with the space before it.
    """
    mark = f" {CONTEXT_MARK}"
    # The last occurrence of each mark: a system prompt before them may hold any text.
    rest, _, after = rendered.rpartition(f" {QUESTION_MARK}")
    before, _, between = rest.rpartition(mark) if has_context else ("", mark, rest)
    return before, between, after


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
