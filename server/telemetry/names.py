"""Labels that name something: what is known keeps its name, everything else is `other`, and there are never too many.

Clients can send any model's name, so no name of theirs becomes a label unless the settings or an engine know it. What
an engine says of where a score was (layer, direction) is bounded by its bank; `Bounded` holds it to that.
"""

from __future__ import annotations

from collections.abc import Collection

OTHER = "other"
NONE = "none"
MOST = 2000
"""Series of one metric with such labels. More are counted together."""


def model_label(name: object, known: Collection[str]) -> str:
    """A request's model. `known`: those of the settings and of the engines."""
    if name is None:
        return NONE
    return name if isinstance(name, str) and name in known else OTHER


class Bounded:
    """The first `most` combinations of values keep theirs."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._seen: set[tuple[str, ...]] = set()

    def of(self, values: tuple[str, ...], kept: int = 0) -> tuple[str, ...]:
        """`values`, or, where there are too many already, `other` in the place of all but the last `kept`."""
        if values in self._seen:
            return values
        if len(self._seen) < self._most:
            self._seen.add(values)
            return values
        cut = len(values) - kept
        return (OTHER,) * cut + values[cut:]
