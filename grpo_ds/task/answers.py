"""The answer contract: <reasoning>...</reasoning><answer>one answer</answer>, and nothing else.

Prompts, rewards and grading all use one `AnswerFormat`. `parse` splits a completion at its tags in one pass (the
pattern reads each character at most a few times) and looks up the order of the tags in a table. Tags that are doubled,
nested, misspelled or out of order are not in the table and earn nothing. Completions and labels are compared in one
Unicode form (spelling.py).

What stands between the answer tags depends on the kind of answer: one of a few labels, a number (numbers.py), a text,
or anything, if no answer is right and the reward functions decide.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_ds.task.numbers import number_of, number_text
from grpo_ds.task.spelling import label_key, nfc, text_key

AnswerKind = Literal["labels", "number", "text", "none"]

# Words that our own system prompt shows between the tags. Small models copy "..." literally, and words too, so a copy
# is neither reasoning nor an answer. The labels stand for themselves: "yes or no".
REASONING_PLACEHOLDER = "your reasons"
ANSWER_PLACEHOLDERS: dict[AnswerKind, str] = {"number": "a number", "text": "your short answer"}

TAG_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)  # ASCII: sampling estimates a tag's tokens from its characters
CONTROL = r"<[|\uff5c][^<>\s]*[|\uff5c]>"  # a chat template's control token: <|im_end|>


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """Parts of the answer contract that a completion satisfies.

    Example: the reasoning is well-formed, the answer is not one of the labels.
        >>> AnswerFormat().parse("<reasoning>It fell.</reasoning><answer>perhaps</answer>")
        ParsedAnswer(answer=None, reasoning_tags=True, answer_tags=False)
    """

    answer: str | None  # as `AnswerFormat.read` returns it; None unless the complete text satisfies the contract
    reasoning_tags: bool  # one reasoning pair in its place, with words in it
    answer_tags: bool  # one answer pair in its place, with an answer in it

    @property
    def well_formed(self) -> bool:
        """True for both pairs, in order, with only white space around them."""
        return self.answer is not None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The answers that are allowed, and the names of the tags.

    Example:
        >>> answer_format = AnswerFormat(labels=("yes", "no", "maybe"))
        >>> answer_format.write("It fell by half.", "yes")
        '<reasoning>It fell by half.</reasoning><answer>yes</answer>'
        >>> answer_format.parse("<reasoning>It fell by half.</reasoning> <answer>Yes.</answer>").answer
        'yes'
        >>> AnswerFormat(kind="number").parse("<reasoning>2 and 2.</reasoning><answer>4.0</answer>").answer
        '4'
    """

    labels: tuple[str, ...] = ("yes", "no")  # spelled as in prompts; no two have the same label_key
    reasoning_tag: str = "reasoning"
    answer_tag: str = "answer"
    kind: AnswerKind = "labels"
    units: tuple[str, ...] = ()  # of a number

    @property
    def is_closed(self) -> bool:
        """True if the answer is one of a few labels, so that classes can be counted and have probabilities."""
        return self.kind == "labels"

    @property
    def wanted(self) -> str:
        """Allowed answers, in words."""
        return {"labels": " or ".join(self.labels), "number": "a number", "text": "a text", "none": "a text"}[self.kind]

    @property
    def placeholders(self) -> tuple[str, str]:
        """Words of our own system prompt in place of a reasoning and of an answer."""
        return REASONING_PLACEHOLDER, ANSWER_PLACEHOLDERS.get(self.kind, self.wanted)

    @property
    def reasoning_pair(self) -> tuple[str, str]:
        return f"<{self.reasoning_tag}>", f"</{self.reasoning_tag}>"

    @property
    def answer_pair(self) -> tuple[str, str]:
        return f"<{self.answer_tag}>", f"</{self.answer_tag}>"

    @property
    def opening(self) -> str:
        """Tag at the end of a prefilled prompt; its completion starts after it."""
        return self.reasoning_pair[0]

    @property
    def stop(self) -> str:
        """Tag at which sampling stops; "" if no answer is right: the completion need not have tags."""
        return "" if self.kind == "none" else self.answer_pair[1]

    @property
    def tag_pattern(self) -> str:
        """Regular expression of the four tags and of two things that must not count as text.

        These are texts similar to a tag (<ANSWER>, <answer id="1">, < /answer >), which some readers would take for a
        second answer, and the control tokens of a chat, which begin another turn.
        """
        return rf"<\s*(?:/\s*)?(?:{self.reasoning_tag}|{self.answer_tag})(?![\w-])[^<>]*>|{CONTROL}"

    def parse(self, completion: str) -> ParsedAnswer:
        """Parse a completion. If <reasoning> was prefilled, the caller must put that tag back in front."""
        pieces = re.split(f"({self.tag_pattern})", nfc(completion), flags=re.IGNORECASE)
        texts, tags = pieces[0::2], tuple(pieces[1::2])  # texts[i] is the text before tags[i]
        both = self.reasoning_pair + self.answer_pair
        # both[:3]: cut within the answer, at the token limit
        has_reasoning = tags in (self.reasoning_pair, both[:3], both) and is_reasoning(texts[1])
        answer = self.read(texts[-2]) if tags in (self.answer_pair, both) else None
        prose = any(text.strip() for text in texts[0::2])  # before, between and after the pairs
        well_formed = tags == both and has_reasoning and not prose
        return ParsedAnswer(answer if well_formed else None, has_reasoning, answer is not None)

    def read(self, text: str) -> str | None:
        """Return the answer between the tags: the label, the number in its canonical spelling, or the text itself.

        None if it is not an answer of this kind.
        """
        if self.kind == "labels":
            return self.label_of(text)
        if self.kind == "number":
            number = number_of(text, self.units)
            return None if number is None else number_text(number)
        return nfc(text.strip()) if text_key(text) and not is_copy(text, self.placeholders[1]) else None

    def is_right(self, answer: str | None, accepted: Sequence[str]) -> bool:
        """Return True if the answer equals one of the accepted ones; no answer is right without any."""
        if answer is None or self.kind == "none" or (key := self.key(answer)) is None:
            return False
        return key in map(self.key, filter(None, accepted))

    def key(self, answer: str) -> str | None:
        """Return what two spellings of one answer share; None for a text that is no answer."""
        return text_key(answer) if self.kind == "text" else self.read(answer)

    def label_of(self, text: str) -> str | None:
        """Return the label in this text, ignoring case, white space and one full stop; None for any other text."""
        exact = nfc(text).strip()
        forms = (label_key(exact), label_key(exact.removesuffix(".").rstrip()))
        label = next((label for label in self.labels if label_key(label) in forms), None)
        # Case folding turns a long s into "s", so a label in ASCII must be spelled in ASCII.
        return label if label and (exact.isascii() or not label.isascii()) else None

    def write(self, reasoning: str, answer: str) -> str:
        """Return the completion that `parse` reads back."""
        return reasoning.join(self.reasoning_pair) + answer.join(self.answer_pair)

    def reads_back(self, label: str) -> bool:
        """Return True if `parse` reads this label back: not if it holds a tag, or is another label plus a full stop."""
        return self.parse(self.write("word", label)).answer == label

    def split(self, completion: str) -> tuple[str, str]:
        """Split a completion into (reasoning, rest) for display; unlike `parse` it accepts any text."""
        opened, closed = self.reasoning_pair
        reasoning, _, rest = completion.partition(closed)
        return reasoning.replace(opened, "").strip(), rest.strip()


def is_reasoning(text: str) -> bool:
    """Return True if it has a letter or a digit and is not the prompt's placeholder."""
    return any(map(str.isalnum, text)) and not is_copy(text, REASONING_PLACEHOLDER)


def is_copy(text: str, placeholder: str) -> bool:
    """Return True for the placeholder itself, in any case, white space and full stops around it."""
    return text.strip().strip(".\u2026").casefold() == placeholder.casefold()
