"""What a score is allowed to grow by in a request that is longer than any of calibration.

A phase's score is the largest over its tokens, and the largest of more tokens is larger. Thresholds come from clean
requests of at most `tokens` tokens, so beyond that a token's score is held against a threshold that grows with it: by
2 * scale * ln(i / tokens) at the i-th token. Where clean scores have an exponential tail of that scale, the tokens
beyond add to the false-positive rate at most once more what the first `tokens` tokens have, however many they are: the
sum of (tokens / i)^2 over i > tokens is at most `tokens`. See docs/decisions/0011-length.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TAIL_SHARE = 0.1
"""The tail is what lies above the score that this share of clean requests exceeds."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How one detector's score grows with the length of one phase."""

    tokens: int
    """The most tokens of this phase that a held-out request had."""
    scale: float
    """Mean excess of clean scores over the start of their tail, in units of the score."""

    @classmethod
    def fit(cls, scores: Sequence[float], tokens: int) -> Growth:
        """`scores`: one per held-out request, -inf where there is none; `tokens`: the most that one had."""
        finite = np.sort(np.asarray([score for score in scores if np.isfinite(score)], dtype=np.float64))
        if not len(finite):
            return cls(max(1, tokens), 0.0)
        start = finite[int(len(finite) * (1 - TAIL_SHARE))]
        tail = finite[finite > start] - start
        return cls(max(1, tokens), float(tail.mean()) if len(tail) else 0.0)

    def allowance(self, places: torch.Tensor) -> torch.Tensor:
        """What to take off the scores of tokens at these places of their phase, from 0: float32 [T] for int64 [T]."""
        beyond = (places.float() + 1.0) / self.tokens
        return 2.0 * self.scale * beyond.clamp_min(1.0).log()
