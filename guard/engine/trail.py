"""The scores of a sequence's last tokens, so that an incident can show how it got there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

BEFORE, AFTER = 48, 16
"""Tokens that are kept up to the one that flagged, and after it. Evidence rides in headers, which have limits."""
_GAP = 8
"""Most tokens that a detector passes over without its being another place: drafts that were accepted."""


class Trail:
    """Of one detector. Costs a clean sequence an append a token."""

    __slots__ = ("_left", "points")

    def __init__(self) -> None:
        self.points: deque[tuple[int, float]] = deque(maxlen=BEFORE + AFTER)
        """Positions and scores, less growth; positions rise."""
        self._left: int | None = None
        """How many more are taken; None: all, the oldest go."""

    def add(self, first: int, values: Iterable[float]) -> None:
        """Scores of tokens from position `first` on."""
        if self._left == 0:
            return
        last = self.points[-1][0] if self.points else -1
        # What a preempted sequence computes again is known already.
        new = [(position, value) for position, value in enumerate(values, first) if position > last]
        if not new:
            return
        if self.points and new[0][0] - last > _GAP:
            if self._left is not None:
                self._left = 0
                return
            self.points.clear()
        if self._left is not None:
            new = new[: self._left]
            self._left -= len(new)
        self.points.extend(new)

    def settle(self) -> None:
        """The sequence was flagged just now: what led there stays."""
        if self._left is None:
            self._left = AFTER


def window(size: int, row: int | None) -> slice:
    """Which of so many scores of one pass are worth an `add`: those around `row`, which flags, else the last ones."""
    if row is None:
        return slice(max(0, size - BEFORE), size)
    return slice(max(0, row + 1 - BEFORE), row + AFTER)
