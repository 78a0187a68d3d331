"""The results, indexed: which rates there are, pooled over which subjects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from guard.evaluation.report.names import DELTAS, DETECTORS, KINDS, METHODS, ordered
from guard.evaluation.results import Rate, Results, Subject, bootstrap_interval, interval

# What is served judges both phases; what judges one alone is shown with it.
_PHASES = ("both", "prompt", "completion")

_Key = tuple[str, str, str, str, float | None]


@dataclass(frozen=True)
class Pool:
    """A share counted over several subjects: one (hits, count) of each."""

    members: tuple[tuple[int, int], ...]

    @property
    def hits(self) -> int:
        return sum(hits for hits, _ in self.members)

    @property
    def count(self) -> int:
        return sum(count for _, count in self.members)

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Over prompts."""
        return interval(self.hits, self.count)

    @cached_property
    def over_subjects(self) -> tuple[float, float] | None:
        """Over subjects; None for fewer than three."""
        return bootstrap_interval(self.members)


@dataclass(frozen=True)
class Group:
    """Subjects that share a row."""

    family: str
    method: str
    subjects: tuple[Subject, ...]


class View:
    """`results`, asked by what the tables need."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.run = results.run
        self.target = results.run.headline_target
        self.detector = results.run.headline_detector
        self._rates: dict[_Key, dict[str, list[Rate]]] = defaultdict(lambda: defaultdict(list))
        for rate in results.rates:
            key = (rate.delta, rate.detector, rate.phase, rate.kind, rate.target)
            self._rates[key][rate.subject].append(rate)

    @cached_property
    def deltas(self) -> list[str]:
        """Of banks, in order; without "none"."""
        return [delta for delta in ordered((rate.delta for rate in self.results.rates), DELTAS) if delta != "none"]

    @cached_property
    def kinds(self) -> list[str]:
        return ordered((rate.kind for rate in self.results.rates), KINDS)

    def of_kind(self, *kinds: str) -> list[Subject]:
        return [subject for subject in self.results.subjects if subject.kind in kinds]

    @cached_property
    def attacked(self) -> list[Subject]:
        """What the pooled tables pool: backdoored organisms that were admitted, and a user's own models."""
        return [subject for subject in self.of_kind("backdoor", "model") if subject.admitted is not False]

    @cached_property
    def weak(self) -> list[Subject]:
        return [subject for subject in self.results.subjects if subject.admitted is False]

    @cached_property
    def groups(self) -> list[Group]:
        """The attacked by family and method, in the order in which they come; a model without a family is alone."""
        found: dict[tuple[str, str], list[Subject]] = defaultdict(list)
        for subject in self.attacked:
            found[subject.family or subject.name, subject.method].append(subject)
        families = list(dict.fromkeys(family for family, _ in found))
        methods = ordered((method for _, method in found), METHODS)
        keys = [(family, method) for family in families for method in methods if (family, method) in found]
        return [Group(*key, tuple(found[key])) for key in keys]

    def detectors(self, delta: str) -> list[str]:
        return ordered((rate.detector for rate in self.results.rates if rate.delta == delta), DETECTORS)

    def phases(self, delta: str, detector: str) -> list[str]:
        """That were measured, the one that is shown first."""
        return [phase for phase in _PHASES if any(key[:3] == (delta, detector, phase) for key in self._rates)]

    def pool(
        self,
        subjects: Iterable[Subject],
        delta: str,
        kind: str,
        *,
        detector: str | None = None,
        target: float | None = None,
        phase: str | None = None,
    ) -> Pool | None:
        """What was flagged in all of `subjects`; the headline's detector and target unless told.

        A rule that has a threshold of its own answers to every target. None when nothing was counted.
        """
        detector = self.detector if detector is None else detector
        phases = self.phases(delta, detector)[:1] if phase is None else [phase]
        names = [subject.name for subject in subjects]
        for one in phases:
            for asked in (self.target if target is None else target, None):
                rows = self._rates.get((delta, detector, one, kind, asked), {})
                counts = [(row.flagged, row.count) for name in names for row in rows.get(name, ()) if row.count]
                if counts:
                    return Pool(tuple(counts))
        return None

    def has_own_threshold(self, delta: str, detector: str) -> bool:
        """Whether the detector comes with a threshold of its own, so that no target was asked of it."""
        targets = {key[4] for key in self._rates if key[:2] == (delta, detector)}
        return targets == {None}

    def label(self, delta: str, detector: str) -> str:
        """The detector's name, with the phase that it reads where it does not read both."""
        phases = self.phases(delta, detector)
        alone = [phase for phase in ("prompt", "completion") if phase in phases]
        return f"{detector} ({alone[0]})" if len(alone) == 1 else detector
