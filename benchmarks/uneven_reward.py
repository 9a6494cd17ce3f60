"""Rewards for runs of random weights, whose completions are all wrong: equal ones would give no gradient."""

from typing import Any


def spread(completions: list[str], **columns: Any) -> list[float]:
    """Return rewards that differ within a group but depend only on the text."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
