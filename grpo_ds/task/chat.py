"""A chat as the model's template renders it, compared with what was handed in.

A template may edit what it is given: it refuses the system role, removes the reasoning from earlier turns, or begins
the assistant's turn itself. What it would lose stands in the user's turn instead, a reasoning tag that it opens counts
as prefilled, and a template after which no answer could be read is refused.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from grpo_ds.errors import UsageError
from grpo_ds.task.answers import CONTROL, TAG_NAME, AnswerFormat

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Private-use characters: no chat template has a reason to contain or remove them.
CONTEXT_MARK = "\ue000context\ue001"
QUESTION_MARK = "\ue000question\ue001"
TURN_MARK = "\ue000turn{}\ue001"  # an earlier turn of a chat of the data's own
# What may begin a part of the assistant's turn: <think>, <seed:think>, <think mode="long">, [THINK], a control token.
BRACKETS = "<>\\[\\]\u2039\u203a\u25c1\u25b7"  # < > [ ] and the like, in a character class
OPENS_OR_CLOSES = re.compile(
    rf"(?P<control>{CONTROL})|[<\[\u2039\u25c1](?P<end>/?)(?P<name>[^\W\d][^\s{BRACKETS}]*)[^{BRACKETS}]*[>\]\u203a\u25b7]"
)
SAYS_END = re.compile(r"(?<![a-z])end(?![a-z])|/", re.IGNORECASE)  # <|END_THINKING|>, <|/think|>, <end_of_turn>
TEMPLATE_FILE, TEMPLATE_KEY = "chat_template.jinja", "chat_template in tokenizer_config.json"
LONGEST_REASON = 160  # characters of a template's own error
NO_SYSTEM_ROLE = "The chat template has no place for a system prompt: the instructions begin the first user turn."
EDITS_TURNS = "The chat template edits earlier assistant turns: the worked examples are text of the user's turn."
FIX_TEMPLATE = "Use an instruction-tuned model, or fix its chat template: {}."
Messages = list[dict[str, str]]


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
    lead: str = " "  # in front of context and question: tokenizers join a word with the space before it

    def opening(self, answer_format: AnswerFormat) -> str:
        """Return the reasoning that the completion continues, from its tag on; "" if the tag is not open.

        It is a part of the prompt, put there by the template or by --prefill, and a part of the answer.
        """
        opened, closed = answer_format.reasoning_pair
        _, tag, begun = self.after.rpartition(opened)
        return tag + begun if tag and closed not in begun else ""


def render_chat(tokenizer: Any, messages: Messages, *, answer_format: AnswerFormat, prefill: bool) -> Chat:
    """Render the chat of any question, in the first arrangement that the template repeats unchanged.

    messages: the chat, with marks in place of the question's texts. prefill: end it with an open reasoning tag.
    Raises UsageError for a template that loses the question or the instructions in every arrangement, or fails.
    """
    failed, lost = "", ""
    for arranged, notes in _arrangements(messages):
        try:
            rendered = _apply_template(tokenizer, arranged)
        except Exception as error:  # a template raises what it likes, for a role or for roles that do not alternate
            failed = failed or f"fails: {' '.join(str(error).split())[:LONGEST_REASON]}"
            continue
        text = _lost(rendered, arranged)
        if not text:
            asked = messages[-1]["content"]
            lead = " " if f" {QUESTION_MARK}" in asked else ""
            chat = Chat(*_cut_at_marks(rendered, CONTEXT_MARK in asked, lead), notes, lead)
            tag = answer_format.opening * (prefill and not chat.opening(answer_format))
            return replace(chat, after=chat.after + tag)
        lost = lost or f"does not repeat {text} unchanged"
    raise UsageError(
        f"The tokenizer's chat template {lost or failed}.\n{FIX_TEMPLATE.format(template_file(tokenizer))}"
    )


def check_chat_template(tokenizer: Any, messages: Messages, *, answer_format: AnswerFormat) -> tuple[str, ...]:
    """Return warnings about the template, one line each. Raises UsageError if no completion after it could be read."""
    chat = render_chat(tokenizer, messages, answer_format=answer_format, prefill=False)
    if answer_format.kind == "none":  # no answer is read
        return chat.notes
    header, own = _assistant_header(tokenizer), answer_format.reasoning_tag
    # Some templates put the system prompt behind the question; it may name any tag.
    tail = chat.after.rpartition(messages[0]["content"])[2]
    if left := _left_out(header, chat.after):
        raise UsageError(
            f"The chat template begins an assistant's turn with {left.strip()[:80]!r}, but its generation prompt "
            "does not,\nand a completion with control tokens in front of the answer earns nothing.\n"
            f"Add that text to the generation prompt: {template_file(tokenizer)}."
        )
    # What begins every turn, such as <bot>, opens nothing.
    usual = _opened(header) or _opened(_user_header(tokenizer))
    for tag, name in _opened(tail).items():
        known = tag in usual or tag == answer_format.opening or (not header and re.match(CONTROL, tag))
        if not known:
            raise _unknown_opening(tag, name, answer_format, template_file(tokenizer))
    if answer_format.reasoning_pair[1] in tail and not chat.opening(answer_format):
        closed = f"The chat template closes <{own}> before the completion, so the model may not reason in it."
        return (*chat.notes, f"{closed} Try another --reasoning_tag.")
    return chat.notes


def ensure_chat_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the default one, after BOS if the tokenizer starts texts with BOS."""
    if tokenizer.chat_template:
        return
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * starts_with_bos + DEFAULT_CHAT_TEMPLATE


def _arrangements(messages: Messages) -> Iterator[tuple[Messages, tuple[str, ...]]]:
    """Yield the chat and notes on it: unchanged, then with instructions and examples as text of the user's turn."""
    yield messages, ()
    system = [turn for turn in messages[:1] if turn["role"] == "system"]
    if system:
        yield _without_system_role(messages), (NO_SYSTEM_ROLE,)
    # Turns before a chat's own last one are no examples, and a template that edits them is refused.
    if len(turns := messages[len(system) :]) > 1 and turns[-1]["content"] != QUESTION_MARK:
        alone = [*system, {"role": "user", "content": _examples_as_text(turns)}]
        yield alone, (EDITS_TURNS,)
        if system:
            yield _without_system_role(alone), (NO_SYSTEM_ROLE, EDITS_TURNS)


def _without_system_role(messages: Messages) -> Messages:
    system, first, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]


def _examples_as_text(turns: Messages) -> str:
    """Return the last user turn with the turns before it as examples in front."""
    shown = {"user": "Example:\n\n{}", "assistant": "Reply:\n\n{}"}
    examples = [shown[turn["role"]].format(turn["content"]) for turn in turns[:-1]]
    return "\n\n".join([*examples, "Now reply to this:", turns[-1]["content"]])


def _lost(rendered: str, messages: Messages) -> str:
    """Name a text that the template does not repeat; "" if it repeats all, and earlier answers begin as the next."""
    if messages[-1]["content"] not in rendered:
        return "the last user turn"
    place, headers = 0, []
    for message in messages:
        if message["role"] == "system":  # some templates put it before the last user turn
            if message["content"] not in rendered:
                return "the system prompt"
            continue
        start = rendered.find(message["content"], place)
        if start < 0:
            return f"an earlier {message['role']} turn"
        if message["role"] == "assistant":
            headers.append(rendered[place:start].rstrip())
        place = start + len(message["content"])
    return "" if all(rendered[place:].startswith(header) for header in headers) else "an earlier assistant turn"


def _opened(text: str) -> dict[str, str]:
    """Map each tag that the text opens and does not close to its name; a control token to ""."""
    opened: dict[str, str] = {}
    for mark in OPENS_OR_CLOSES.finditer(text):
        name = mark["name"] or ""  # of a control token ""
        if mark["end"] or mark[0].endswith("/>") or SAYS_END.search(name or mark[0]):
            opened = {tag: other for tag, other in opened.items() if other != name}
        else:
            opened[mark[0]] = name
    return opened


def template_file(tokenizer: Any) -> str:
    """Name the place of the chat template; both, if the tokenizer is not of a local folder."""
    if not os.path.isdir(folder := str(getattr(tokenizer, "name_or_path", ""))):
        return f"{TEMPLATE_FILE}, or {TEMPLATE_KEY}"
    return TEMPLATE_FILE if os.path.isfile(os.path.join(folder, TEMPLATE_FILE)) else TEMPLATE_KEY


def _unknown_opening(tag: str, name: str, answer_format: AnswerFormat, file: str) -> UsageError:
    own, usable = answer_format.reasoning_tag, TAG_NAME.fullmatch(name) and tag == f"<{name}>"
    taken = name.lower() in (own.lower(), answer_format.answer_tag.lower())
    change = f"change the generation prompt: {file}."
    return UsageError(
        f"The chat template opens {tag[:80]} at the end of every prompt, but the reasoning tag is <{own}>:\n"
        f"a completion would continue {tag[:80]}, and an answer behind it earns nothing.\n"
        + (f"Try --reasoning_tag {name}, or {change}" if usable and not taken else change.capitalize())
    )


def _left_out(header: str, after: str) -> str:
    """Return the header from the first control token on that the generation prompt leaves out; "" for none."""
    place = 0
    for token in re.finditer(CONTROL, header):
        place = after.find(token[0], place) + len(token[0])
        if place < len(token[0]):
            return header[token.start() :]
    return ""


def _assistant_header(tokenizer: Any) -> str:
    """Return the template's text between a user's turn and the answer; "" if it loses earlier turns."""
    header, found, _ = _around(tokenizer, "user", "assistant", "user")[1].partition(CONTEXT_MARK)
    return header if found else ""


def _user_header(tokenizer: Any) -> str:
    return _around(tokenizer, "user")[0]


def _around(tokenizer: Any, *roles: str) -> tuple[str, str]:
    """Return the template's text before and after the first user's text; "" where it fails."""
    texts = {"user": QUESTION_MARK, "assistant": CONTEXT_MARK}
    try:
        rendered = _apply_template(tokenizer, [{"role": role, "content": texts[role]} for role in roles])
    except Exception:  # a template raises what it likes
        return "", ""
    before, _, after = rendered.partition(QUESTION_MARK)
    return before, after


def _apply_template(tokenizer: Any, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _cut_at_marks(rendered: str, has_context: bool, lead: str) -> tuple[str, str, str]:
    """Return the template's text before the context ("" without one), between context and question, and after.

    The space before a mark belongs to the user's text, because tokenizers join a word with the space before it.
    """
    mark = f"{lead}{CONTEXT_MARK}"
    # The last occurrence of each mark: a system prompt before them may hold any text.
    rest, _, after = rendered.rpartition(f"{lead}{QUESTION_MARK}")
    before, _, between = rest.rpartition(mark) if has_context else ("", mark, rest)
    return before, between, after
