"""Plots as inline SVG. Colours are classes, so that they follow the page into dark mode and onto paper.

    panel = Panel(x=Axis.log(0.001, 1, "clean flagged", rate), y=Axis.share("triggered found"))
    panel.line([(0.001, 0.4), (0.01, 0.9)], style="c0", title="density")
    figure = panel.svg("ROC of density: 90% found at 1%")

What is not finite is left out; a line breaks there. What lies beyond an axis is drawn at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from guard.evaluation.report.markup import Html, element
from guard.evaluation.report.numbers import percent, plain, rate

Point = tuple[float, float]

SERIES = 10
"""Colours that the page's style knows, c0 to c9."""


@dataclass(frozen=True)
class Axis:
    """From values to 0..1, with the values that get a tick."""

    low: float
    high: float
    label: str
    ticks: tuple[float, ...]
    text: Callable[[float], str] = plain
    logarithmic: bool = False

    @classmethod
    def share(cls, label: str, high: float = 1.0) -> Axis:
        """Percent, from none to `high`."""
        return cls(0.0, high, label, _round_ticks(0.0, high), rate)

    @classmethod
    def linear(cls, values: Iterable[float], label: str, text: Callable[[float], str] = plain) -> Axis:
        """From zero, or below where there are values below, to a round number above all values."""
        finite = [value for value in values if math.isfinite(value)]
        ticks = _round_ticks(min([0.0, *finite]), max([0.0, *finite]) or 1.0)
        return cls(ticks[0], ticks[-1], label, ticks, text)

    @classmethod
    def log(cls, low: float, high: float, label: str, text: Callable[[float], str] = plain) -> Axis:
        """From a round number to another, 1, 2 or 5 of a decade; a tick at each, or at decades if there are many."""
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        decades = [float(f"1e{power}") for power in range(first, last + 1)]
        rounds = [float(f"{decade * factor:.6g}") for decade in decades for factor in (1, 2, 5)]
        begin = max((value for value in rounds if value <= low * (1 + 1e-9)), default=rounds[0])
        end = min((value for value in rounds if value >= high * (1 - 1e-9) and value > begin), default=rounds[-1])
        within = [value for value in rounds if begin <= value <= end]
        ticks = within if len(within) <= 7 else [value for value in within if value in decades]
        return cls(begin, end, label, tuple(ticks), text, logarithmic=True)

    @classmethod
    def steps(cls, names: Sequence[str], label: str) -> Axis:
        """One tick per name, evenly spaced, at 0, 1, 2, ..."""
        ticks = tuple(float(index) for index in range(len(names)))
        return cls(0.0, max(1.0, len(names) - 1.0), label, ticks, lambda value: names[int(value)])

    @classmethod
    def sizes(cls, values: Sequence[int], label: str) -> Axis:
        """Logarithmic, with a tick at each size that was tried, as far as there is room."""
        positive = sorted({value for value in values if value > 0})
        if len(positive) < 2:
            return cls.linear([float(value) for value in positive], label, _count)
        ticks = [float(positive[0])]
        width = math.log(positive[-1] / positive[0])
        for value in positive[1:]:
            if math.log(value / ticks[-1]) >= width / 7:
                ticks.append(float(value))
        return cls(float(positive[0]), float(positive[-1]), label, tuple(ticks), _count, logarithmic=True)

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Panel:
    """One pair of axes, and what is drawn between them in the order in which it was asked for."""

    def __init__(self, x: Axis, y: Axis, width: int = 320, height: int = 220) -> None:
        self.x, self.y = x, y
        self._width, self._height = width, height
        self._left, self._right, self._top, self._bottom = 44, width - 12, 10, height - 38
        self._marks: list[Html] = []

    def line(self, points: Iterable[Point], style: str, title: str, dots: bool = False) -> None:
        """A line through the points, with a dot at each if asked."""
        runs: list[list[str]] = [[]]
        places: list[Point] = []
        for point in points:
            if not all(map(math.isfinite, point)):
                runs.append([])
                continue
            place = self._place(point)
            runs[-1].append(_pair(place))
            places.append(place)
        path = " ".join("M" + " L".join(run) for run in runs if len(run) > 1)
        if path:
            self._marks.append(element("path", element("title", title), class_=f"line {style}", d=path))
        if dots or not path:
            self._dots(places, style, title, "dot")

    def scatter(self, points: Iterable[Point], style: str, title: str) -> None:
        """A cloud: one path however many points, so that thousands stay small."""
        places = [self._place(point) for point in points if all(map(math.isfinite, point))]
        self._dots(places, style, title, "cloud")

    def stairs(self, points: Sequence[Point], style: str, title: str) -> None:
        """A line that holds each value until the next."""
        finite = [point for point in points if all(map(math.isfinite, point))]
        held = [(after[0], before[1]) for before, after in pairwise(finite)]
        corners = [point for pair in zip(finite, held, strict=False) for point in pair] + finite[-1:]
        self.line(corners, style, title)

    def vertical(self, value: float, title: str) -> None:
        if math.isfinite(value):
            x, _ = self._place((value, self.y.low))
            self._rule(x, self._top, x, self._bottom, title)

    def horizontal(self, value: float, title: str) -> None:
        if math.isfinite(value):
            _, y = self._place((self.x.low, value))
            self._rule(self._left, y, self._right, y, title)

    def svg(self, alternative: str) -> Html:
        """`alternative`: what a reader who cannot see the plot is told."""
        return element(
            "svg",
            *self._grid(),
            *self._marks,
            role="img",
            aria_label=alternative,
            viewBox=f"0 0 {self._width} {self._height}",
            class_="plot",
        )

    def _place(self, point: Point) -> Point:
        return (
            self._left + self.x.at(point[0]) * (self._right - self._left),
            self._bottom - self.y.at(point[1]) * (self._bottom - self._top),
        )

    def _dots(self, places: Sequence[Point], style: str, title: str, kind: str) -> None:
        # A line of no length with round ends is a dot.
        path = "".join(f"M{_pair(place)}h0" for place in places)
        if path:
            self._marks.append(element("path", element("title", title), class_=f"{kind} {style}", d=path))

    def _rule(self, x1: float, y1: float, x2: float, y2: float, title: str) -> None:
        ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
        self._marks.append(element("line", element("title", title), class_="rule", **ends))

    def _grid(self) -> list[Html]:
        parts = []
        for tick in self.x.ticks:
            x, _ = self._place((tick, self.y.low))
            parts.append(_line(x, self._top, x, self._bottom))
            anchor = "middle" if x < self._right - 8 else "end"
            parts.append(_text(min(x, self._right), self._bottom + 14, self.x.text(tick), anchor))
        for tick in self.y.ticks:
            _, y = self._place((self.x.low, tick))
            parts.append(_line(self._left, y, self._right, y))
            parts.append(_text(self._left - 6, y + 4, self.y.text(tick), "end"))
        middle = (self._left + self._right) / 2
        parts.append(_text(middle, self._height - 5, self.x.label, "middle", "axis"))
        return parts


def strip(values: Sequence[float], axis: Axis, target: float, band: tuple[float, float], alternative: str) -> Html:
    """A distribution in one row: a dot per value, as large as the value is frequent, over its middle half and its mean.

    `band` is shaded; `target` is a rule across.
    """
    width, height = 340, 34
    finite = sorted(value for value in values if math.isfinite(value))

    def x(value: float) -> float:
        return 8 + axis.at(value) * (width - 16)

    low, high = x(band[0]), x(band[1])
    parts = [_box("band", low, 0, high - low, height)]
    most = max((finite.count(value) for value in set(finite)), default=1)
    for value in sorted(set(finite)):
        count = finite.count(value)
        radius = 1.2 + 5.3 * math.sqrt(count / most)
        title = element("title", f"{percent(value)}: {count} of {len(finite)}")
        spot = element("circle", title, cx=f"{x(value):.1f}", cy="17", r=f"{radius:.1f}", class_="spot")
        parts.append(spot)
    parts.append(element("line", class_="rule", x1=f"{x(target):.1f}", x2=f"{x(target):.1f}", y1="0", y2=str(height)))
    if finite:
        first, third = quantile(finite, 0.25), quantile(finite, 0.75)
        parts.append(_box("half", x(first), 15, max(1.0, x(third) - x(first)), 4))
        parts.append(_box("mean", x(sum(finite) / len(finite)) - 1.5, 6, 3, 22))
    return element(
        "svg",
        *parts,
        role="img",
        aria_label=alternative,
        viewBox=f"0 0 {width} {height}",
        width=str(width),
        height=str(height),
        class_="strip",
    )


def strip_axis(axis: Axis) -> Html:
    """The ticks over a column of strips."""
    parts = [
        _text(
            8 + axis.at(tick) * 324,
            11,
            axis.text(tick),
            "end" if tick == axis.ticks[-1] else "middle" if index else "start",
        )
        for index, tick in enumerate(axis.ticks)
    ]
    return element("svg", *parts, aria_hidden="true", viewBox="0 0 340 14", width="340", height="14", class_="strip")


def mini(share: float, low: float, high: float, most: float, style: str, mark: float | None = None) -> Html:
    """A share and its interval in a table's cell, on an axis from 0 to `most`; `mark` is where it should lie."""

    def x(value: float) -> str:
        return f"{100 * min(max(value / most, 0.0), 1.0):.1f}"

    parts = [element("line", class_="track", x1="0", x2="100", y1="4", y2="4")]
    if mark is not None:
        parts.append(element("line", class_="mark", x1=x(mark), x2=x(mark), y1="0", y2="8"))
    parts.append(element("line", class_=f"reach {style}", x1=x(low), x2=x(high), y1="4", y2="4"))
    parts.append(element("line", class_=f"here {style}", x1=x(share), x2=x(share), y1="0.5", y2="7.5"))
    return element("svg", *parts, aria_hidden="true", viewBox="0 0 100 8", preserveAspectRatio="none", class_="mini")


def legend(entries: Iterable[tuple[str, str]], *, dots: bool = False) -> Html:
    """(style, name) of what is drawn, as lines or as dots."""
    items = []
    for style, name in entries:
        sample = element("path", class_=f"dot {style}", d="M11 5h0") if dots else _line(1, 5, 21, 5, f"line {style}")
        key = element("svg", sample, aria_hidden="true", viewBox="0 0 22 10", class_="key")
        items.append(element("li", key, name))
    return element("ul", *items, class_="legend")


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, between the two that are nearest."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:g}k"


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers, four to seven of them, the first at most `low` and the last at least `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{index * step:.6g}") for index in range(first, last + 1))


def _pair(place: Point) -> str:
    return f"{place[0]:.1f} {place[1]:.1f}"


def _line(x1: float, y1: float, x2: float, y2: float, style: str = "grid") -> Html:
    return element("line", class_=style, x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}")


def _box(style: str, x: float, y: float, width: float, height: float) -> Html:
    return element("rect", class_=style, x=f"{x:.1f}", y=f"{y:g}", width=f"{width:.1f}", height=f"{height:g}")


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=style)


__all__ = ["Axis", "Panel", "legend", "mini", "quantile", "strip", "strip_axis"]
