"""Means, intervals and paired tests over questions; all pure, all two-sided at 95%.

Questions are the sample: the completions of one question are averaged first, and n is the number
of questions, never of completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution, at (1 + CONFIDENCE) / 2
RESAMPLES = 10_000
_BATCH_VALUES = 2**22  # that the bootstrap draws at a time: 32 MiB

Interval = tuple[float, float]


def mean_and_se(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over questions and its standard error (unbiased variance); None of fewer than two.

    >>> mean_and_se([0.0, 1.0, 1.0, 0.0])
    (0.5, 0.28867513459481287)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    if min(values) == max(values):
        return values[0], 0.0  # whatever rounding makes of it
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def mean_with_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean and Student's interval of it; None of a single value.

    >>> mean, (low, high) = mean_with_interval([0.5, 0.6, 0.7])
    >>> round(mean, 3), round(low, 3), round(high, 3)
    (0.6, 0.352, 0.848)
    """
    mean, se = mean_and_se(values)
    if se is None:
        return mean, None
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * se
    return mean, (mean - half, mean + half)


def proportion_interval(share: float, n: int) -> Interval:
    """Wilson's score interval of a share of n (Wilson 1927; Newcombe 1998, method 3).

    >>> [round(bound, 3) for bound in proportion_interval(0.0, 10)]
    [0.0, 0.278]
    """
    z2 = _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # share itself is inside, which rounding would forget at 0 and 1
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of values in [0, 1], cut to there.

    Where all values are equal, or there is one, it would have no width: then it is Wilson's, which
    is at least as wide as any spread of values in [0, 1] can make it.
    """
    mean, interval = mean_with_interval(values)
    if interval is None or interval[0] == interval[1]:
        return proportion_interval(mean, len(values))
    return max(0.0, interval[0]), min(1.0, interval[1])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed.

    >>> percentile([5, 1, 4, 2], 0.5), percentile([5, 1, 4, 2], 0.9)
    (2, 5)
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class PairedProportions:
    """Two proportions over the same questions.

    a, b: the shares that are right. only_a, only_b: questions that only one has right.
    difference: b - a, with Bonett and Price's interval (2012). p: McNemar's exact test.
    """

    a: float
    b: float
    only_a: int
    only_b: int
    difference: float
    ci: Interval
    p: float


def paired_proportions(a: Sequence[bool], b: Sequence[bool]) -> PairedProportions:
    """Compare two evaluations by the questions that one has right and the other wrong.

    p is the binomial test of only_b among only_a + only_b at 1/2; 1 where no question differs.
    """
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    p = 1.0
    if only_a + only_b:
        from scipy.stats import binomtest

        p = float(binomtest(only_b, only_a + only_b, 0.5).pvalue)
    lost, gained = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    middle = gained - lost
    half = _Z * math.sqrt((gained + lost - middle * middle) / (n + 2))
    difference = (only_b - only_a) / n
    ci = (max(-1.0, middle - half), min(1.0, middle + half))
    return PairedProportions(sum(a) / n, sum(b) / n, only_a, only_b, difference, ci, p)


@dataclass(frozen=True)
class PairedMeans:
    """Two means over the same questions.

    difference: b - a, with the percentile interval of the bootstrap over questions. p: twice the
    smaller share of resamples on the other side of 0, and not below 2^(1-m) where m questions
    differ, the smallest that a test of their signs could give (few questions give a bootstrap too
    little to draw from). Where p is over 5% the interval holds 0.
    """

    a: float
    b: float
    difference: float
    ci: Interval
    p: float


def paired_means(a: Sequence[float], b: Sequence[float], seed: int) -> PairedMeans:
    """Compare two evaluations by each question's difference (Efron and Tibshirani 1993, ch. 13).

    seed: of the resampling; the same values and seed give the same numbers.
    """
    import numpy as np

    differences = np.subtract(b, a, dtype=np.float64)
    n = len(differences)
    rng = np.random.default_rng(seed)
    at_once = max(1, _BATCH_VALUES // n)
    means = np.concatenate(
        [
            differences[rng.integers(0, n, (min(at_once, RESAMPLES - start), n))].mean(axis=1)
            for start in range(0, RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # the sample itself is one of its resamples: p is never 0
    below = (np.count_nonzero(means <= 0) + 1) / (RESAMPLES + 1)
    above = (np.count_nonzero(means >= 0) + 1) / (RESAMPLES + 1)
    differ = int(np.count_nonzero(differences))
    p = min(1.0, max(2 * min(below, above), 2.0 ** (1 - differ)))
    if p > 1 - CONFIDENCE:
        low, high = min(low, 0.0), max(high, 0.0)
    return PairedMeans(
        math.fsum(a) / n,
        math.fsum(b) / n,
        math.fsum(differences) / n,
        (float(low), float(high)),
        float(p),
    )
