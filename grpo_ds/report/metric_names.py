"""Names of metrics in a line of metrics.jsonl, shared by the console, the live view and the page."""

import re

MEAN_LENGTH = "completions/mean_length"  # tokens
CLIPPED_RATIO = "completions/clipped_ratio"  # share of completions cut at the length limit
REWARD_MEAN = re.compile(r"rewards/(.*)/mean", re.DOTALL)


def reward_name(metric: str) -> str | None:
    """Return NAME of the metric rewards/NAME/mean, None for any other metric."""
    match = REWARD_MEAN.fullmatch(metric)
    return match[1] if match else None
