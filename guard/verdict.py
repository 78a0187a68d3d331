"""From a score and its threshold to a verdict. Pure, torch-free."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["prompt", "completion"]
"""`prompt`: tokens that the client sent. `completion`: tokens that the model generated."""

PHASES: tuple[Phase, ...] = ("prompt", "completion")

DetectorName = Literal["density", "exceedance"]
"""`density`: distance to the nearest clean references in bank space, at decision positions.
`exceedance`: how far a cosine leaves its clean range, at every token (the paper's rule without its threshold)."""

DETECTORS: tuple[DetectorName, ...] = ("density", "exceedance")


@dataclass(frozen=True, slots=True)
class Score:
    """The largest score that one detector gave to one phase of one request, and where."""

    detector: DetectorName
    phase: Phase
    value: float
    """Dimensionless. `density`: distance over its clean scale. `exceedance`: cosine beyond its clean range, negative
    inside."""
    position: int
    """Index of the token in the sequence, prompt included, from 0."""
    layer: int
    """Index of the decoder layer, from 0, that contributed most."""
    direction: str | None
    """Name of the direction that contributed most, such as `L3.o_proj.u0`; None where no single one did."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score held against its threshold."""

    score: Score
    threshold: float
    p_value: float
    """Share of clean requests that scored at least as high: (1 + #{clean >= value}) / (n + 1)."""

    @property
    def exceeded(self) -> bool:
        """True where the score lies above the threshold. NaN counts as above: it is never a pass."""
        return not self.score.value <= self.threshold

    @property
    def ratio(self) -> float:
        """Score over threshold, 1.0 at the threshold. Infinite for NaN, and above a threshold that is not positive."""
        if math.isnan(self.score.value):
            return math.inf
        if self.threshold <= 0:
            return math.inf if self.exceeded else 0.0
        return max(0.0, self.score.value / self.threshold)


def p_value(value: float, clean: Sequence[float]) -> float:
    """The conformal p-value of `value` among `clean`, which must be sorted ascending.

    NaN is given the smallest p-value that the data can express.
    """
    above = 0 if math.isnan(value) else len(clean) - bisect_left(clean, value)
    return (1 + above) / (len(clean) + 1)


def judge(score: Score, threshold: float, clean: Sequence[float]) -> Verdict:
    """Hold one score against its threshold. `clean` holds the calibration's scores, sorted ascending."""
    return Verdict(score, threshold, p_value(score.value, clean))
