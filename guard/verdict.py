"""From a score and its threshold to a verdict. Pure, torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Phase = Literal["prompt", "completion"]
"""`prompt`: tokens that the client sent. `completion`: tokens that the model generated."""

PHASES: tuple[Phase, ...] = ("prompt", "completion")

DetectorName = Literal["density", "intrinsic", "exceedance"]
"""`density`: how improbable is where the residual stands, and what layers wrote, along the weight delta's directions at
decision positions.
`intrinsic`: the same on directions of the tuned model's own matrices; needs no base model.
`exceedance`: how far a cosine leaves its clean range, at every token (the paper's rule without its threshold)."""

DETECTORS: tuple[DetectorName, ...] = ("density", "intrinsic", "exceedance")


@dataclass(frozen=True, slots=True)
class Score:
    """The largest score that one detector gave to one phase of one request, and where."""

    detector: DetectorName
    phase: Phase
    value: float
    """Dimensionless. `density` and `intrinsic`: Mahalanobis distance over the root of the number of directions, about 1
    for clean tokens. `exceedance`: cosine beyond its clean range, negative inside."""
    position: int
    """Index of the token in the sequence, prompt included, from 0."""
    layer: int
    """Index of the decoder layer, from 0, that contributed most."""
    direction: str | None
    """Name of the direction that contributed most, such as `L3.o_proj.u0`; None where no single one did."""
    first: int | None = None
    """Position of the first token of the same pass whose score lies above the sequence's threshold; None where none
    does, or where nobody looked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score held against its threshold."""

    score: Score
    threshold: float
    p_value: float
    """The smallest false-positive rate at which this score is flagged, by all detections that share the rate."""

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
