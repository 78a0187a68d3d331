"""One turn of a measurement: what is asked for how long, and what came of it. Sans-I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from server.benching.client import Heard, Question

LIMIT = 200_000
"""Times that are kept of one kind; of more every second one is let go, again and again."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Requests that begin at random moments, whatever becomes of those before them (Poisson)."""

    name: str
    seconds: float
    rate: float
    """Requests begun in a second."""
    streams: float
    """The share of them that are streams."""
    tokens: int
    """Of a stream. A whole answer has one."""
    interval_s: float
    """Between two tokens. A whole answer takes the engine as long."""
    seed: int
    held: int = 0
    """Tokens of a stream that are held back by whoever is asked."""
    blocked: float = 0.0
    """The share of requests that are to be blocked."""
    grace_s: float = 10.0
    """What has not ended so long after it should have is cut off."""
    told: bool = False
    """Say every second how it goes."""

    def schedule(self) -> Iterator[tuple[float, Question]]:
        """Seconds from the turn's beginning, and what is asked then. The same for the same seed."""
        chance, at, number = Random(self.seed), 0.0, 0
        while True:
            at += chance.expovariate(self.rate)
            stream, blocked = chance.random() < self.streams, chance.random() < self.blocked
            if at > self.seconds:
                return
            name = f"{self.name}-{number}-{'blocked' if blocked else 'passed'}"
            yield at, Question(self.tokens if stream else 1, self.interval_s, stream, blocked, name)
            number += 1


@dataclass(frozen=True, slots=True)
class Flood:
    """Streams of which every token is sent as soon as it can be."""

    seconds: float
    streams: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    count: int
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times | None:
        """None where there is nothing."""
        ordered = sorted(values)
        return cls(len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.99)) if ordered else None


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least that share does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(slots=True)
class Outcome:
    """What came of a turn."""

    seconds: float = 0.0
    answers: int = 0
    """That came to their end, in the shape that they were to have."""
    failed: int = 0
    """That did not; how they failed is in `failures`."""
    failures: dict[str, int] = field(default_factory=dict)
    frames: int = 0
    lost: int = 0
    """Frames of answers that ended: missing, doubled or out of order."""
    blocked: list[str] = field(default_factory=list)
    """Request ids of answers that were blocked as they should have been."""
    unclear: list[str] = field(default_factory=list)
    """Request ids of answers that should have been and of which no end was seen."""
    late_s: float = 0.0
    """The most that a request began behind its moment: the clients' own slowness."""
    times: dict[str, Times] = field(default_factory=dict)
    """By what they are of: `request`, `first token`, `first token released`, `between tokens`."""


class Kept:
    """Values, evenly thinned out where they become many."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._stride = 1
        self._seen = 0

    def add(self, values: Sequence[float]) -> None:
        self._seen += 1
        if self._seen % self._stride:
            return
        self._values += values
        if len(self._values) > LIMIT:
            del self._values[::2]
            self._stride *= 2

    def times(self) -> Times | None:
        return Times.of(self._values)


class Tally:
    """Counts answers as they end."""

    def __init__(self, held: int) -> None:
        """`held`: tokens of a stream that are held back by whoever was asked."""
        self.outcome = Outcome()
        self._held = held
        self._kept: dict[str, Kept] = {}

    def add(self, heard: Heard) -> None:
        outcome = self.outcome
        if heard.question.stream:
            outcome.frames += len(heard.tokens)
        if not heard.whole:
            outcome.failed += 1
            how = _failure(heard)
            outcome.failures[how] = outcome.failures.get(how, 0) + 1
            if heard.question.blocked and not heard.ended:
                outcome.unclear.append(heard.question.id)
            return
        outcome.answers += 1
        outcome.lost += heard.lost
        if heard.question.blocked:
            outcome.blocked.append(heard.question.id)
        elif not heard.lost:
            for name, values in self._times(heard).items():
                self._kept.setdefault(name, Kept()).add(values)

    def close(self) -> Outcome:
        """All of it, with the times."""
        found = {name: kept.times() for name, kept in self._kept.items()}
        self.outcome.times = {name: times for name, times in found.items() if times is not None}
        return self.outcome

    def _times(self, heard: Heard) -> dict[str, list[float]]:
        """Without what the engine took for itself: from the request's arrival there until it sent."""
        sent = [moment for _, moment, _ in heard.tokens]
        came = [moment for _, _, moment in heard.tokens]
        engine = sent[0] - heard.received
        if not heard.question.stream:
            return {"request": [(heard.ended - heard.asked - engine) / 1e9]}
        times = {"first token": [(came[0] - heard.asked - engine) / 1e9]}
        # A token that is held back leaves when the one comes that frees it.
        freed = sent[self._held :]
        if len(freed) > 1:
            times["first token released"] = [(came[0] - heard.asked - (freed[0] - heard.received)) / 1e9]
            ways = [(arrived - left) / 1e9 for arrived, left in zip(came, freed, strict=False)]
            times["between tokens"] = [later - before for before, later in pairwise(ways)]
        return times


def _failure(heard: Heard) -> str:
    if heard.leaked:
        return "payload reached the client"
    if heard.status not in (0, 200):
        return f"status {heard.status}"
    if not heard.ended:
        return "no end" if heard.status else "no answer"
    if heard.filtered != heard.question.blocked:
        return "not blocked" if heard.question.blocked else "blocked"
    return "no [DONE]"
