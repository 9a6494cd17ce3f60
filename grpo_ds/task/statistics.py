"""Intervals and tests for a figure that every question has, such as p(right), without an assumption about its form.

Draws are seeded, so the same figures give the same interval. Plain Python: 445 questions take a fifth of a second.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import compress, product
from math import sqrt
from statistics import variance

DRAWS = 4000  # of a bootstrap or a test; the ends of an interval then vary by about 3 % of its width
SEED = 0
COVERED = 0.95
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
ROUNDING = 1e-12  # sums of the same values in another order


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over other questions of the same kind: percentile bootstrap (Efron 1979)."""
    draw = random.Random(SEED).choices
    means = sorted(mean(draw(values, k=len(values))) for _ in range(DRAWS))
    cut = round(DRAWS * (1 - COVERED) / 2)
    return means[cut], means[-cut - 1]


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927); unlike p +- 1.96 s it stays in [0, 1], also for few."""
    share, z2 = successes / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At the ends centre and half cancel exactly, but not in floats.
    return centre - half if successes else 0.0, centre + half if successes < count else 1.0


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value that paired differences are as often positive as negative, at every size (Fisher 1935).

    A permutation test: their mean is compared with the means after flips of their signs, all flips of few differences
    and DRAWS random ones of many.
    """
    total = sum(differences)
    reached = abs(total) - ROUNDING * len(differences)
    sums = [abs(total - 2 * sum(compress(differences, flips))) >= reached for flips in _flips(len(differences))]
    counted = int(2 ** len(differences) > DRAWS)  # the differences as they are: not among random flips
    return (sum(sums) + counted) / (len(sums) + counted)


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, tuple[float, float], float]:
    """Return the mean change of paired values, its interval, and the p-value of no change."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    return mean(changes), bootstrap_interval(changes), sign_flip_p(changes)


def auc(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the share of pairs with the positive above the negative, a tie counting half, and its 95 % interval.

    The area under the ROC curve. Its variance is that of the shares by question (DeLong et al. 1988), its interval
    normal, cut to [0, 1]; if all shares are equal, that of a share of the rarer class.
    """
    above = [mean([(a > b) + (a == b) / 2 for b in negative]) for a in positive]
    below = [mean([(a > b) + (a == b) / 2 for a in positive]) for b in negative]
    area = mean(above)
    half = Z_95 * sqrt(_error(above) + _error(below))
    if not half:
        rarer = min(len(positive), len(negative))
        return area, wilson_interval(area * rarer, rarer)
    return area, (max(0.0, area - half), min(1.0, area + half))


def calibration_error(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015): mean gap between confidence and accuracy.

    Confidences in [0, 1] are put into bins of equal width; the gap of a bin is that of its means, weighted by its size.
    """
    gaps = [0.0] * bins
    for confidence, is_right in zip(confidences, right, strict=True):
        gaps[min(int(confidence * bins), bins - 1)] += confidence - is_right
    return sum(map(abs, gaps)) / len(confidences)


def _error(shares: Sequence[float]) -> float:
    """Squared standard error of their mean; of a single one 1/4, the most that a share can have."""
    return variance(shares) / len(shares) if len(shares) > 1 else 1 / 4


def _flips(count: int) -> Iterator[Sequence[int]]:
    """Return which of `count` signs to flip, again and again."""
    if 2**count <= DRAWS:
        yield from product((0, 1), repeat=count)
        return
    bits = random.Random(SEED).getrandbits
    for _ in range(DRAWS):
        yield [*map(int, f"{bits(count):0{count}b}")]
