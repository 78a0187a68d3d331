"""A token bucket: a rate per minute, of which a minute's worth may be taken at once. Sans-I/O.

bucket = Bucket(60, now)
bucket.level(now) >= 1 and bucket.take(1, now)
bucket.wait(1, now)               # seconds until there is one
"""

from __future__ import annotations


class Bucket:
    """Starts full. What is taken may be more than there is: then it is in debt, and fills up again from there."""

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        """`now`: seconds of a clock that never goes back."""
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What can be taken now; below zero in debt."""
        return min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60)

    def take(self, count: float, now: float) -> None:
        """Take it, whether it is there or not."""
        self._level, self._at = self.level(now) - count, now

    def wait(self, count: float, now: float) -> float:
        """Seconds until that much can be taken; 0 where it can be now."""
        return max(0.0, (count - self.level(now)) * 60 / self.per_minute)

    def resize(self, per_minute: int, now: float) -> None:
        """Another rate from now on. What was taken stays taken."""
        missing = self.per_minute - self.level(now)
        self.per_minute, self._at = per_minute, now
        self._level = per_minute - missing
