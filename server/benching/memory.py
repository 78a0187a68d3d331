"""Whether memory grows, and how much of that may be noise. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

_SETTLES = 0.2
"""The share of a soak in which caches and pools fill."""
_LEAST = 300
"""Samples: one a second, so five minutes."""
_BLOCKS = 20
_SHUFFLES = 2_000


@dataclass(frozen=True, slots=True)
class Growth:
    """Of a series of samples at even distances."""

    first_bytes: int
    last_bytes: int
    slope: float
    """Bytes per second, after the first fifth."""
    noise: float
    """What 95% of shuffled blocks of the same samples stay below, either way: bytes per second."""

    @property
    def within_noise(self) -> bool:
        return abs(self.slope) <= self.noise


def growth(samples: Sequence[tuple[float, int]]) -> Growth | None:
    """From seconds and bytes. None where there are too few to tell growth from the start.

    Neighbouring samples are alike, so what is fitted and shuffled is the means of blocks.
    """
    if len(samples) < _LEAST:
        return None
    settled = samples[int(len(samples) * _SETTLES) :]
    size = len(settled) // _BLOCKS
    blocks = [settled[start : start + size] for start in range(0, len(settled) - size + 1, size)]
    times = [fmean(at for at, _ in block) for block in blocks]
    means = [fmean(held for _, held in block) for block in blocks]
    chance = Random(0)
    shuffled = sorted(abs(_slope(times, chance.sample(means, len(means)))) for _ in range(_SHUFFLES))
    noise = shuffled[int(0.95 * _SHUFFLES)]
    return Growth(samples[0][1], samples[-1][1], _slope(times, means), noise)


def _slope(times: Sequence[float], values: Sequence[float]) -> float:
    """By least squares."""
    middle, mean = fmean(times), fmean(values)
    spread = sum((at - middle) ** 2 for at in times)
    return sum((at - middle) * (value - mean) for at, value in zip(times, values, strict=True)) / spread
