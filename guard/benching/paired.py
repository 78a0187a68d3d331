"""Paired timings: two engines take turns, and what counts is the ratio within a pair.

Machines are noisy over minutes and quiet over seconds; a ratio of neighbours forgets the slow part of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from guard.intervals import median_interval


@dataclass(frozen=True, slots=True)
class Pair:
    """One measure, taken of both within a round, in tokens per second or seconds."""

    plain: float
    guarded: float

    @property
    def ratio(self) -> float:
        return self.guarded / self.plain


@dataclass(frozen=True, slots=True)
class Row:
    """One measure over all rounds."""

    measure: str
    unit: str
    pairs: tuple[Pair, ...]

    @property
    def ratio(self) -> float:
        """Guarded over plain: the median of the pairs'."""
        return median(pair.ratio for pair in self.pairs)

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the median, from the order of the ratios."""
        return median_interval([pair.ratio for pair in self.pairs])

    def __str__(self) -> str:
        low, high = self.interval
        plain, guarded = (median(values) for values in zip(*((p.plain, p.guarded) for p in self.pairs), strict=True))
        return (
            f"{self.measure:<28} plain {plain:>10.2f} {self.unit:<5} guarded {guarded:>10.2f} {self.unit:<5} "
            f"ratio {self.ratio:.4f} [{low:.4f}, {high:.4f}] of {len(self.pairs)} pairs"
        )


T = TypeVar("T")


def take_turns(plain: Callable[[int], T], guarded: Callable[[int], T], rounds: int) -> Iterator[tuple[T, T]]:
    """Both in turn, each given the number of the round from 1; who goes first changes every round."""
    for number in range(1, rounds + 1):
        if number % 2:
            first = plain(number)
            yield first, guarded(number)
        else:
            second = guarded(number)
            yield plain(number), second


def table(rows: Sequence[Row]) -> str:
    """One line per measure."""
    return "\n".join(map(str, rows))
