"""Thresholds for several scores of one request that together keep one false-positive rate.

A request has one score per detector and phase. It is flagged where *any* of them lies above its threshold, so the
thresholds have to be chosen together. Split conformal prediction (Vovk, Gammerman and Shafer, 2005) does it for one
score; here it is done for all at once, by rank:

    a request is flagged at rank r    some score of it is larger than the r-th largest of the n held-out requests
    U(r)                              how many of the n held-out requests have some score among the r largest of all n
    the rank for a rate a             the largest r with (U(r) + 1) / (n + 1) <= a

Why the rate holds: add the new request to the n and call the n + 1 exchangeable ones S. Let U_S(r) count the
requests of S with some score among the r largest of S, and R the largest r with U_S(r) <= a (n + 1). R does not depend
on the order of S, so the new request is one of those U_S(R) with probability E[U_S(R)] / (n + 1) <= a. Adding a request
to n others takes none of them into the r largest, so U_S(r) <= U(r) + 1; the rank that was chosen is therefore at most
R, and who is flagged at a rank is flagged at every larger one. Ties count against flagging. No rate is split between
phases or detectors: scores that move together share it. For one score this is split conformal prediction, one
rank stricter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from guard.errors import CalibrationError

Key = TypeVar("Key")

ROUNDING = 1e-9
"""A rate written as 3 / (n + 1) must not lose its rank to rounding."""


class JointRanks(Generic[Key]):
    """The held-out scores of one set of detectors and phases, ready to give thresholds and p-values."""

    def __init__(self, clean: Mapping[Key, Sequence[float]]) -> None:
        """`clean`: per score the held-out requests in one order for all; -inf where a request has no such score.

        Raises CalibrationError where there is nothing to rank, or the scores are not of the same requests.
        """
        lengths = {len(scores) for scores in clean.values()}
        if len(lengths) != 1:
            raise CalibrationError(f"held-out scores of {sorted(lengths)} requests, expected the same requests for all")
        (self.count,) = lengths
        columns = {key: np.asarray(scores, dtype=np.float64) for key, scores in clean.items()}
        self._ascending = {key: np.sort(column) for key, column in columns.items()}
        first = np.full(self.count, self.count + 1)
        for key, column in columns.items():
            ranks = self.count - np.searchsorted(self._ascending[key], column, side="left")
            # No score, no rank: a request without a completion is flagged by none.
            first = np.minimum(first, np.where(np.isneginf(column), self.count + 1, ranks))
        self._first_ranks = np.sort(first)

    @property
    def supported(self) -> float:
        """The smallest rate that these requests can keep: (U(1) + 1) / (n + 1)."""
        return self._rate(1)

    def rank(self, fpr: float) -> int:
        """The rank for a rate; 0 where the requests are too few for it."""
        allowed = math.floor(fpr * (self.count + 1) + ROUNDING) - 1
        if allowed < 0 or self.count == 0:
            return 0
        # The largest r with U(r) <= allowed lies below the rank that the next request enters at.
        if allowed >= self.count:
            return self.count
        return min(self.count, int(self._first_ranks[allowed]) - 1)

    def threshold(self, key: Key, fpr: float) -> float:
        """The score that flags when exceeded.

        Raises CalibrationError where the requests are too few for the rate.
        """
        rank = self.rank(fpr)
        if rank < 1:
            raise CalibrationError(
                f"a false-positive rate of {fpr:g} cannot be kept with {self.count} held-out clean requests, which "
                f"support {self.supported:.4g} or more; about {self.needed(fpr)} are needed"
            )
        return float(self._ascending[key][self.count - rank])

    def p_value(self, key: Key, value: float) -> float:
        """The smallest rate at which this score alone would be flagged. At most a with probability at most a.

        NaN is given the smallest p-value that the data can express.
        """
        ascending = self._ascending[key]
        above = 0 if math.isnan(value) else self.count - int(np.searchsorted(ascending, value, side="left"))
        return self._rate(above + 1)

    def needed(self, fpr: float) -> int:
        """About how many held-out requests a rate needs, as many scores as these apart from each other."""
        return needed_requests(fpr, len(self._ascending))

    def _rate(self, rank: int) -> float:
        entered = int(np.searchsorted(self._first_ranks, rank, side="right"))
        return min(1.0, (entered + 1) / (self.count + 1))


def needed_requests(fpr: float, scores: int) -> int:
    """How many held-out requests keep a rate for this many scores, even where no two of them are ever largest for the
    same request."""
    return math.ceil((scores + 1) / fpr - ROUNDING) - 1
