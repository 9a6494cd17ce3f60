"""The answer contract: <reasoning>...</reasoning><answer>label</answer>, and nothing else.

Prompts ask for it, rewards pay for it, grading counts it: all through this one parser. A completion is cut
at the four tags in one pass (the pattern has nothing to backtrack into), and what it earns is looked up from
the order of its tags. Whatever is doubled, nested or out of order is in no row of that table and earns nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

REASONING_OPEN = "<reasoning>"
REASONING_CLOSE = "</reasoning>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

_TAGS = re.compile("(</?(?:reasoning|answer)>)")
_REASONING_ALONE = (REASONING_OPEN, REASONING_CLOSE)
_REASONING_THEN_CUT_OFF = (REASONING_OPEN, REASONING_CLOSE, ANSWER_OPEN)  # out of tokens within the answer
_ANSWER_ALONE = (ANSWER_OPEN, ANSWER_CLOSE)
_BOTH = (REASONING_OPEN, REASONING_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)


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


def parse_answer(completion: str, *, labels: Sequence[str]) -> ParsedAnswer:
    """Read a completion; one generated from a prefilled <reasoning> comes with that tag put back in front."""
    pieces = _TAGS.split(completion)
    texts, tags = pieces[0::2], tuple(pieces[1::2])  # texts[i] stands before tags[i]
    has_reasoning = tags in (_REASONING_ALONE, _REASONING_THEN_CUT_OFF, _BOTH) and _has_words(texts[1])
    label = _as_label(texts[-2], labels) if tags in (_ANSWER_ALONE, _BOTH) else None
    prose = any(text.strip() for text in texts[0::2])  # before, between and after the pairs
    whole = tags == _BOTH and has_reasoning and not prose
    return ParsedAnswer(label if whole else None, has_reasoning, label is not None)


def write_answer(reasoning: str, answer: str) -> str:
    """The text that `parse_answer` reads back."""
    return f"{REASONING_OPEN}{reasoning}{REASONING_CLOSE}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def split_reasoning(completion: str) -> tuple[str, str]:
    """(reasoning, the rest) for people to read; it forgives what the parser does not."""
    reasoning, _, rest = completion.partition(REASONING_CLOSE)
    return reasoning.replace(REASONING_OPEN, "").strip(), rest.strip()


def _has_words(text: str) -> bool:
    # "..." is the prompt's own placeholder; repeating it is no reasoning.
    return any(character.isalnum() for character in text)


def _as_label(text: str, labels: Sequence[str]) -> str | None:
    """The label the text is, forgiving case, white space and one full stop."""
    candidate = text.strip().removesuffix(".").rstrip().casefold()
    return candidate if candidate in labels else None
