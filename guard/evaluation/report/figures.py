"""What every section that is drawn needs: panels side by side per delta, a colour per name, the numbers below."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Protocol, TypeVar

from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DELTAS, ordered
from guard.evaluation.report.plots import SERIES, Axis, Panel
from guard.evaluation.report.tables import heads, more, table
from guard.evaluation.report.view import View


class OfSubject(Protocol):
    """A row of the results."""

    @property
    def subject(self) -> str: ...
    @property
    def delta(self) -> str: ...


Row = TypeVar("Row", bound=OfSubject)


def by_delta(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.delta].append(row)
    return [(delta, found[delta]) for delta in DELTAS if delta in found]


def drawn(view: View, rows: Sequence[Row]) -> list[Row]:
    """Of the subjects that the tables pool; of all where there are none of those. The numbers name every subject."""
    pooled = {subject.name for subject in view.attacked}
    return [row for row in rows if row.subject in pooled] or list(rows)


def by_family(view: View, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """A subject without a family is one."""
    family = {subject.name: subject.family or subject.name for subject in view.results.subjects}
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[family[row.subject]].append(row)
    return found


def styles(names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """A colour for each name that occurs; known names come first."""
    return {name: f"c{index % SERIES}" for index, name in enumerate(ordered(names, known))}


def figure(title: str, panel: Panel, alternative: str, key: Html | None = None) -> Html:
    return element("figure", element("figcaption", title), panel.svg(alternative), key)


def block(
    delta: str, panels: Sequence[Html], caption: str, head: Sequence[Child], rows: Iterable[Sequence[Child]]
) -> Html:
    """One delta's panels, and the numbers that they show."""
    return join(
        element("h3", "no bank" if delta == "none" else delta),
        element("div", *panels, class_="panels"),
        more(f"The numbers ({delta})", table(f"{caption}, {delta}", [heads(*head)], rows)),
    )


def share_axis(values: Iterable[float], label: str, target: float) -> Axis:
    """0 to 100%; enlarged where every share is small, the target still on it."""
    highest = max((value for value in values if math.isfinite(value)), default=0.0)
    return Axis.share(label) if highest > 0.25 else Axis.share(label, max(highest, 2 * target))


def mean(values: Iterable[float]) -> float:
    """Of those that are finite; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def thousands(value: float) -> str:
    return f"{value:,.0f}"
