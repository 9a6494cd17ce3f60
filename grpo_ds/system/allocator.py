"""Settings of torch's memory allocator on a card."""

import os

VARIABLES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Let segments of GPU memory grow, unless the user has set the allocator. Call before CUDA starts.

    A simulated card (docs/memory.md) needs 1 to 3 % more than is allocated with them, and up to 15 % without: freed
    segments of one phase have other sizes than the requests of the next.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = EXPANDABLE
