"""A question as prompts, rewards and grading know it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the text that answers it if there is one, and the right answer.

    Example:
        >>> Question("17", "Did it fall?", "It fell by half.", "yes", columns={"year": 2011}).columns["year"]
        2011
    """

    id: str  # from the file, or a hash of the texts
    text: str
    context: str  # "" if the data has none
    label: str  # the right answer in its one spelling: as in `labels`, a number, a text; "" if unknown
    accepted: tuple[str, ...] = ()  # all right answers of a kind that may have several, `label` first
    # A complete chat, which stands in place of our own; its last turn is `text`. Not compared: the id knows it.
    messages: tuple[Mapping[str, str], ...] = field(default=(), compare=False, repr=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the record as it was read
