"""Rewards of one's own, as docs/rewards.md explains them."""

WORDS = 40  # of an answer that says what it has to


def concise(completions, **kwargs):
    """0 up to WORDS words, then -0.01 for each word more."""
    return [-0.01 * max(0, len(completion.split()) - WORDS) for completion in completions]


def cites_the_year(completions, year, **kwargs):
    """1 where the answer names the study's year; records without a year do not count."""
    pairs = zip(completions, year, strict=True)
    return [None if known is None else float(str(known) in completion) for completion, known in pairs]
