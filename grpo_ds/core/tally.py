"""Sums and counts by name. Unlike averages, they can be added up over micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Tally:
    """Named (sum, count) pairs; `means()` divides at the end.

    Example: two completions of 30 and 2 tokens.
        >>> tally = Tally()
        >>> tally.add("completions/mean_length", 32, 2)
        >>> tally.as_pairs(), tally.means()
        ({'completions/mean_length': [32.0, 2.0]}, {'completions/mean_length': 16.0})
    """

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1) -> None:
        """Add `total`, the sum of `count` observations, to the pair of this name."""
        pair = torch.tensor([float(total), float(count)], dtype=torch.float64)
        self._pairs[name] = self._pairs.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def add_all(self, values: Mapping[str, list[float]]) -> None:
        """Add a list of observations to each name."""
        for name, observations in values.items():
            self.add(name, sum(observations), len(observations))

    def merge(self, other: "Tally") -> None:
        """Add every pair of `other`."""
        for name, (total, count) in other._pairs.items():
            self.add(name, total, count)

    def as_pairs(self) -> dict[str, list[float]]:
        """Return name -> [sum, count]."""
        return {name: pair.tolist() for name, pair in self._pairs.items()}

    @classmethod
    def of_pairs(cls, pairs: Mapping[str, list[float]]) -> "Tally":
        """Build a tally from the pairs of `as_pairs`."""
        tally = cls()
        for name, (total, count) in pairs.items():
            tally.add(name, total, count)
        return tally

    def as_tensor(self) -> Tensor:
        """Return [names, 2], sorted by name, for ranks to exchange. All ranks must hold the same names."""
        return torch.stack([self._pairs[name] for name in sorted(self._pairs)])

    def means(self, summed: Tensor | None = None) -> dict[str, float]:
        """Return name -> sum / count, from this tally or from the sum of all ranks' `as_tensor()`."""
        pairs = self.as_tensor() if summed is None else summed
        return {name: float(s / c) if c else 0.0 for name, (s, c) in zip(sorted(self._pairs), pairs, strict=True)}
