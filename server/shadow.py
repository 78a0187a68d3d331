"""What a second threshold would have decided, beside the one that does. Sans-I/O.

A p-value is the smallest false-positive rate at which a score is flagged, so evidence alone says what another rate
would have flagged, by all detections that share the live one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from guard.evidence import Record
from guard.verdict import DetectorName, Phase

Would = Literal["pass", "flag"]


@dataclass(frozen=True, slots=True)
class Compared:
    """One score of one sequence, held against both thresholds."""

    detector: DetectorName
    phase: Phase
    live: Would
    shadow: Would


def compare(records: Iterable[Record], shadow: Mapping[DetectorName, float]) -> Iterator[Compared]:
    """Every score that has a second threshold. NaN is never a pass."""
    for record in records:
        for score in record.scores:
            rate = shadow.get(score.detector)
            if rate is not None:
                live: Would = "pass" if score.score <= score.threshold else "flag"
                would: Would = "pass" if score.p_value > rate else "flag"
                yield Compared(score.detector, score.phase, live, would)
