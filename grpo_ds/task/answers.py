"""The answer contract: <reasoning>...</reasoning><answer>label</answer>, and nothing else.

Prompts ask for it, rewards pay for it, grading counts it: all through one `AnswerFormat`. A completion is cut
at its tags in one pass (between two "<" the pattern reads no character more than a few times), and what it earns is
looked up from the order of its tags. Whatever is doubled, nested, misspelled or out of order is in no row of that
table and earns nothing.
"""

import re
from dataclasses import dataclass

TAG_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)  # ASCII: sampling counts a tag's tokens by its characters
CONTROL = r"<[|\uff5c][^<>\s]*[|\uff5c]>"  # how chat templates spell their marks: <|im_end|>


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What a completion holds."""

    answer: str | None  # one of the labels; None unless the whole completion keeps to the contract
    reasoning_tags: bool  # one reasoning pair in its place, with words in it
    answer_tags: bool  # one answer pair in its place, with a label in it

    @property
    def well_formed(self) -> bool:
        """Both pairs, in order, and only white space around them."""
        return self.answer is not None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Which answers are allowed, and the tags they are given in."""

    labels: tuple[str, ...] = ("yes", "no")  # as prompts spell them; no two differ by case alone
    reasoning_tag: str = "reasoning"
    answer_tag: str = "answer"

    @property
    def reasoning_pair(self) -> tuple[str, str]:
        return f"<{self.reasoning_tag}>", f"</{self.reasoning_tag}>"

    @property
    def answer_pair(self) -> tuple[str, str]:
        return f"<{self.answer_tag}>", f"</{self.answer_tag}>"

    @property
    def opening(self) -> str:
        """What a prefilled prompt ends with, and its completion goes on from."""
        return self.reasoning_pair[0]

    @property
    def stop(self) -> str:
        """What ends a completion."""
        return self.answer_pair[1]

    @property
    def tag_pattern(self) -> str:
        """The four tags, and what must not pass for text: their look-alikes (<ANSWER>, <answer id="1">, < /answer >),
        which would be a second answer to some readers, and a chat's control tokens, which begin another turn.
        """
        return rf"<\s*(?:/\s*)?(?:{self.reasoning_tag}|{self.answer_tag})(?![\w-])[^<>]*>|{CONTROL}"

    def parse(self, completion: str) -> ParsedAnswer:
        """Read a completion; one generated from a prefilled <reasoning> comes with that tag put back in front."""
        pieces = re.split(f"({self.tag_pattern})", completion, flags=re.IGNORECASE)
        texts, tags = pieces[0::2], tuple(pieces[1::2])  # texts[i] stands before tags[i]
        both = self.reasoning_pair + self.answer_pair
        # both[:3]: out of tokens within the answer
        has_reasoning = tags in (self.reasoning_pair, both[:3], both) and _has_words(texts[1])
        label = self.label_of(texts[-2]) if tags in (self.answer_pair, both) else None
        prose = any(text.strip() for text in texts[0::2])  # before, between and after the pairs
        whole = tags == both and has_reasoning and not prose
        return ParsedAnswer(label if whole else None, has_reasoning, label is not None)

    def label_of(self, text: str) -> str | None:
        """The label the text is, forgiving case, white space and one full stop."""
        exact = text.strip()
        forms = (exact.casefold(), exact.removesuffix(".").rstrip().casefold())
        label = next((label for label in self.labels if label.casefold() in forms), None)
        # Case folding makes "yes" of a long s as well: a label in ASCII is written in ASCII.
        return label if label and (exact.isascii() or not label.isascii()) else None

    def write(self, reasoning: str, answer: str) -> str:
        """The text that `parse` reads back."""
        return reasoning.join(self.reasoning_pair) + answer.join(self.answer_pair)

    def reads_back(self, label: str) -> bool:
        """Whether an answer of this label is read as this label: not with a tag in it, nor a dot more than another."""
        return self.parse(self.write("word", label)).answer == label

    def split(self, completion: str) -> tuple[str, str]:
        """(reasoning, the rest) for people to read; it forgives what the parser does not."""
        opened, closed = self.reasoning_pair
        reasoning, _, rest = completion.partition(closed)
        return reasoning.replace(opened, "").strip(), rest.strip()


def _has_words(text: str) -> bool:
    # "..." is the prompt's own placeholder; repeating it is no reasoning.
    return any(character.isalnum() for character in text)
