"""Which sequences are steered: along what, from which of their tokens on, and whose tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import torch

from guard.engine.finding import Finding
from guard.engine.projection import Directions, Steered
from guard.engine.runner import Rows
from guard.engine.turns import Turns
from guard.policy import Role
from guard.roles import ROLES
from guard.verdict import DetectorName, Phase

Key = tuple[DetectorName, Phase]


@dataclass(slots=True)
class Course:
    """How one sequence is steered. What is taken out of a token depends on its position alone, so that a token that is
    computed again, after a preemption, is computed the same."""

    number: int
    """Names the sequence where its KV lies."""
    roles: frozenset[int]
    """Indices into `ROLES`: whose tokens."""
    legs: dict[Key, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    """By detector and phase, the first time that it flagged: from which position on, and the layer and direction."""

    @property
    def start(self) -> int:
        """The first position that is steered, whosever token it is."""
        return min(position for position, _ in self.legs.values())

    def spans(self, first: int, stop: int) -> Iterator[tuple[int, int, Directions]]:
        """Positions first to stop - 1 in runs that lose the same directions; those that lose none are left out."""
        edges = sorted({first, stop, *(at for at, _ in self.legs.values() if first < at < stop)})
        for begin, end in pairwise(edges):
            directions = frozenset(direction for at, direction in self.legs.values() if at <= begin)
            if directions:
                yield begin, end, directions


class Courses:
    """Those of all running sequences."""

    def __init__(self, names: Iterable[tuple[int, Sequence[str]]], turns: Turns) -> None:
        """`names`: as for `rename`."""
        self._turns = turns
        self.rename(names)
        self._running: dict[str, Course] = {}
        self._numbers = count(1)

    def rename(self, names: Iterable[tuple[int, Sequence[str]]]) -> None:
        """Of each watched layer its index and the names of its directions, from now on."""
        self._places = {name: (index, place) for index, each in names for place, name in enumerate(each)}

    def __bool__(self) -> bool:
        return bool(self._running)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the steered sequences."""
        return tuple(self._running)

    def __contains__(self, sequence: str) -> bool:
        return sequence in self._running

    def of(self, sequence: str) -> Course | None:
        """None where it is not steered."""
        return self._running.get(sequence)

    def turn(self, rows: Rows, findings: Iterable[Finding], roles: Iterable[Role] | None) -> bool:
        """Take in what flagged a sequence in a pass of these rows; says whether there is anything new.

        Each detector and phase adds the one direction that it named when it first flagged, from the first token on that
        it flagged; from the first of these rows on, where that token's state came from the cache and is not the
        sequence's own to change. What flags later under steering is not the model's natural path.
        """
        course = self._running.get(rows.sequence)
        scores = [(each.verdict.score, each.first) for each in findings]
        new = [
            (score, score.position if first is None else first)
            for score, first in scores
            if course is None or (score.detector, score.phase) not in course.legs
        ]
        if not new:
            return False
        if course is None:
            chosen = frozenset(ROLES.index(role) for role in (roles or ROLES))
            course = self._running[rows.sequence] = Course(next(self._numbers), chosen)
        for score, position in new:
            place = self._places[str(score.direction)]
            course.legs[score.detector, score.phase] = (max(position, rows.first_position), place)
        return True

    def finish(self, sequences: Iterable[str]) -> None:
        """These sequences run no more."""
        for sequence in sequences:
            self._running.pop(sequence, None)

    def plan(self, batch: Iterable[Rows]) -> Iterator[Steered]:
        """What a pass of this batch takes out of which rows."""
        for rows in batch:
            course = self._running.get(rows.sequence)
            if course is None:
                continue
            for begin, end, directions in course.spans(rows.first_position, rows.first_position + rows.count):
                own = torch.tensor(
                    [role in course.roles for role in self._turns.between(rows.sequence, begin, end).tolist()]
                )
                at = torch.arange(begin, end)[own] - rows.first_position + rows.first_row
                yield Steered(at, directions)
