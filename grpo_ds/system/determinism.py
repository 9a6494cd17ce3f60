"""Deterministic kernels on a card: the same numbers from the same rows, so that a resumed run is the uninterrupted one.

Backward passes that add with atomics do so in a random order of threads. torch has ordered ones for them, flash and
memory-efficient attention included, but takes them in its strict mode alone: with `warn_only` both keep their atomics.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STRICT = 2  # raises RuntimeError for an operation that has no deterministic kernel


def fix_workspaces() -> None:
    """Make cuBLAS deterministic unless the user has chosen its workspaces. Call before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Use torch's strict mode inside if there is a card. For forward passes too: there it rules out cuDNN's attention.

    A CPU adds in the same order without it.
    """
    if not _has_card():
        yield
        return
    before = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    torch.set_deterministic_debug_mode(STRICT)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _has_card() -> bool:
    return torch.cuda.is_available()
