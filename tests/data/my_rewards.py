"""Custom rewards; docs/rewards.md explains them."""

WORDS = 40  # a completion needs no more


def concise(completions, **kwargs):
    """0 up to WORDS words, then -0.01 for each further word."""
    return [-0.01 * max(0, len(completion.split()) - WORDS) for completion in completions]


def cites_the_year(completions, year, **kwargs):
    """1 if the completion names the study's year, else 0; None if the record has no year."""
    pairs = zip(completions, year, strict=True)
    return [None if value is None else float(str(value) in completion) for completion, value in pairs]
