"""Exact intervals, for rates that are counted and for medians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NEGLIGIBLE = 1e-17


def clopper_pearson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval for a rate of `hits` in `count` (Clopper and Pearson, 1934)."""
    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"hits must lie in 0..count and count be positive, got {hits} of {count}")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _solve(lambda rate: binomial_tail(hits, count, rate) - tail)
    high = 1.0 if hits == count else _solve(lambda rate: tail - (1 - binomial_tail(hits + 1, count, rate)))
    return low, high


def binomial_tail(least: int, count: int, rate: float) -> float:
    """P(X >= least) for X ~ Binomial(count, rate)."""
    if least <= 0 or rate >= 1:
        return 1.0
    if rate <= 0:
        return 0.0

    def probability(hits: int) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
        return math.exp(ways + hits * math.log(rate) + (count - hits) * math.log1p(-rate))

    # Away from the mean terms fall; what is left behind one that is lost in the first's rounding is lost too.
    upper = least > count * rate
    terms: list[float] = []
    for hits in range(least, count + 1) if upper else range(least - 1, -1, -1):
        terms.append(probability(hits))
        if terms[-1] <= NEGLIGIBLE * terms[0]:
            break
    return min(1.0, math.fsum(terms) if upper else 1 - math.fsum(terms))


def beta_interval(rank: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Where the rate of scores above the `rank`-th largest of `count` clean scores lies: Beta(rank, count + 1 - rank).

    This is the spread of split conformal's promise over the draw of the calibration set (Vovk, 2012).
    """
    tail = (1 - confidence) / 2
    # Beta(k, n + 1 - k) is the law of the k-th smallest of n uniforms: P(B <= x) = P(Binomial(n, x) >= k).
    low = _solve(lambda rate: binomial_tail(rank, count, rate) - tail)
    high = _solve(lambda rate: binomial_tail(rank, count, rate) - (1 - tail))
    return low, high


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of the values between which the median of whatever they are drawn from lies with at least this confidence:
    as many are below it as heads in so many tosses of a coin. The smallest and the largest where they are too few."""
    ordered, tail = sorted(values), (1 - confidence) / 2
    if not ordered:
        raise ValueError("no values, expected at least one")
    # The interval from the (low + 1)-th smallest to the (low + 1)-th largest misses with P(X <= low) on either side.
    low = 0
    while low + 1 <= (len(ordered) - 1) // 2 and 1 - binomial_tail(low + 2, len(ordered), 0.5) <= tail:
        low += 1
    return ordered[low], ordered[len(ordered) - 1 - low]


def _solve(rising: Callable[[float], float]) -> float:
    """The root in [0, 1] of a rising function, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
