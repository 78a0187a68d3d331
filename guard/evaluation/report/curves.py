"""Sections that are drawn: ROC, length, latency, what more prompts or directions buy, what hiding costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Protocol, TypeVar

from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DETECTORS, KINDS, ordered
from guard.evaluation.report.numbers import NOT_MEASURED, percent, plain, rate, span, whole
from guard.evaluation.report.plots import SERIES, Axis, Panel, legend
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import heads, more, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Count, Found, Latency, Lengths, Roc

LOWEST_RATE = 1e-3
"""Where the axis of a ROC begins; what is left of it is decided by a handful of requests."""


class _OfDelta(Protocol):
    @property
    def delta(self) -> str: ...


_Row = TypeVar("_Row", bound=_OfDelta)


def found_at(roc: Roc, target: float) -> float:
    """The largest share found at a false-positive rate of at most `target`; nothing is interpolated."""
    return max((tpr for fpr, tpr in _pairs(roc) if fpr <= target), default=0.0)


def area(roc: Roc) -> float:
    """Under the whole curve, straight between its points; NaN without points."""
    points = sorted(_pairs(roc))
    if not points:
        return math.nan
    points = [(0.0, 0.0), *points, (1.0, 1.0)]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:], strict=False))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, from -1 to 1; NaN where one side does not vary."""
    if len(pairs) < 3:
        return math.nan
    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) - 1) / 2
    spread = math.sqrt(sum((a - middle) ** 2 for a in left) * sum((b - middle) ** 2 for b in right))
    return sum((a - middle) * (b - middle) for a, b in zip(left, right, strict=True)) / spread if spread else math.nan


def _roc(view: View) -> Html | None:
    curves = [curve for curve in view.results.roc if _pairs(curve)]
    if not curves:
        return None
    family = {subject.name: subject.family or subject.name for subject in view.results.subjects}
    styles = _styles((_label(curve) for curve in curves), DETECTORS)
    targets = sorted({LOWEST_RATE, *view.run.targets})
    parts: list[Child] = [
        element(
            "p",
            f"Thresholds from {rate(LOWEST_RATE)} of clean requests on, logarithmic: what lies left of a rate that one can "
            "live with is what counts. A thin line is one model. The rule is the headline's rate.",
        ),
        legend((style, label) for label, style in styles.items()),
    ]
    for delta, rows in _by_delta(curves):
        panels = []
        for name in dict.fromkeys(family[curve.subject] for curve in rows):
            panel = Panel(Axis.log(LOWEST_RATE, 1.0, "clean flagged", rate), Axis.share("triggered found"))
            panel.vertical(view.target, f"asked for: {rate(view.target)}")
            chosen = [curve for curve in rows if family[curve.subject] == name]
            for curve in chosen:
                panel.stairs(_from_lowest(curve), styles[_label(curve)], f"{curve.subject}: {_label(curve)}")
            best = ", ".join(
                f"{label} {percent(fmean(found_at(curve, view.target) for curve in chosen if _label(curve) == label))}"
                for label in styles
                if any(_label(curve) == label for curve in chosen)
            )
            panels.append(_figure(name, panel, f"ROC, {name}, {delta}. Found at {rate(view.target)}: {best}."))
        numbers = [
            [
                curve.subject,
                _label(curve),
                *(_number(percent(found_at(curve, target))) for target in targets),
                _number(f"{area(curve):.3f}"),
            ]
            for curve in rows
        ]
        head = heads("model", "detector", *(f"found at {rate(target)}" for target in targets), "area")
        parts += [
            _delta_heading(delta),
            element("div", *panels, class_="panels"),
            more(f"The numbers ({delta})", table(f"ROC, {delta}", [head], numbers)),
        ]
    return join(*parts)


def _lengths(view: View) -> Html | None:
    entries = [entry for entry in view.results.lengths if entry.points]
    if not entries:
        return None
    styles = _styles((point.kind for entry in entries for point in entry.points), KINDS)
    parts: list[Child] = [
        element("p", f"Each dot is a request; the rule is the threshold at {rate(view.target)}."),
        legend((style, kind) for kind, style in styles.items()),
    ]
    for delta, rows in _by_delta(entries):
        panels, numbers = [], []
        for entry in rows:
            panels.append(_length_panel(entry, styles))
            numbers += [
                _length_row(entry, kind) for kind in styles if any(point.kind == kind for point in entry.points)
            ]
        head = heads(
            "model", "detector", "kind", "requests", "tokens", "median score", "above threshold", "rank correlation"
        )
        parts += [
            _delta_heading(delta),
            element("div", *panels, class_="panels"),
            more(f"The numbers ({delta})", table(f"Length and score, {delta}", [head], numbers)),
        ]
    return join(*parts)


def _length_panel(entry: Lengths, styles: dict[str, str]) -> Html:
    tokens = [point.tokens for point in entry.points]
    scores = [point.score for point in entry.points]
    longest = max([1, *tokens])
    wide = longest > 20 * max(1, min(tokens))
    x = Axis.log(max(1, min(tokens)), longest, "tokens", _tokens) if wide else Axis.linear(tokens, "tokens", _tokens)
    panel = Panel(x, Axis.linear([*scores, entry.threshold], "score"))
    panel.horizontal(entry.threshold, f"threshold {plain(entry.threshold)}")
    for kind, style in styles.items():
        panel.scatter([(point.tokens, point.score) for point in entry.points if point.kind == kind], style, kind)
    told = f"Score of {entry.detector} against length in {entry.subject}: {len(tokens)} requests."
    return _figure(f"{entry.subject}, {entry.detector}", panel, told)


def _length_row(entry: Lengths, kind: str) -> list[Child]:
    points = [(point.tokens, point.score) for point in entry.points if point.kind == kind]
    scores = [score for _, score in points if math.isfinite(score)]
    lengths = [tokens for tokens, _ in points]
    above = sum(score > entry.threshold for score in scores)
    correlation = rank_correlation([pair for pair in points if math.isfinite(pair[1])])
    return [
        entry.subject,
        entry.detector,
        kind,
        _number(whole(len(points))),
        _number(f"{whole(min(lengths))}–{whole(max(lengths))}"),
        _number(plain(median(scores)) if scores else NOT_MEASURED),
        _number(f"{whole(above)}/{whole(len(scores))}"),
        _number(f"{correlation:+.2f}" if math.isfinite(correlation) else NOT_MEASURED),
    ]


def _latency(view: View) -> Html | None:
    entries = [entry for entry in view.results.latency if entry.count]
    if not entries:
        return None
    styles = _styles((entry.detector for entry in entries), DETECTORS)
    family = {subject.name: subject.family or subject.name for subject in view.results.subjects}
    parts: list[Child] = [
        element(
            "p",
            "Triggered requests that were found after so many generated tokens; at 0, on the prompt, before the model said "
            "anything. A thin line is one model.",
        ),
        legend((style, detector) for detector, style in styles.items()),
    ]
    last = max(max(entry.tokens, default=0) for entry in entries)
    for delta, rows in _by_delta(entries):
        panels = []
        for name in dict.fromkeys(family[entry.subject] for entry in rows):
            panel = Panel(Axis.linear([last or 1], "tokens generated", _tokens), Axis.share("found"))
            chosen = [entry for entry in rows if family[entry.subject] == name]
            for entry in chosen:
                steps = sorted({0, *entry.tokens, last})
                points = [(float(step), _within(entry, step)) for step in steps]
                panel.stairs(points, styles[entry.detector], f"{entry.subject}: {entry.detector}")
            early = percent(fmean(_within(entry, 0) for entry in chosen))
            panels.append(_figure(name, panel, f"Latency, {name}, {delta}: {early} found on the prompt."))
        numbers = [
            [
                entry.subject,
                entry.detector,
                *(_number(percent(_within(entry, step))) for step in (0, 1, 4, 16)),
                _number(whole(entry.undetected)),
                _number(whole(entry.count)),
            ]
            for entry in rows
        ]
        head = heads(
            "model", "detector", "on the prompt", "by token 1", "by token 4", "by token 16", "never", "requests"
        )
        parts += [
            _delta_heading(delta),
            element("div", *panels, class_="panels"),
            more(f"The numbers ({delta})", table(f"Latency, {delta}", [head], numbers)),
        ]
    return join(*parts)


def _calibration(view: View) -> Html | None:
    curves = [curve for curve in view.results.calibration_curve if curve.sizes]
    if not curves:
        return None
    styles = _styles((curve.detector for curve in curves), DETECTORS)
    parts: list[Child] = [
        element("p", f"At {rate(view.target)}, with so many clean prompts to calibrate on."),
        legend((style, detector) for detector, style in styles.items()),
    ]
    for delta, rows in _by_delta(curves):
        x = Axis.sizes([size for curve in rows for size in curve.sizes], "clean prompts")
        columns = {
            "triggered found": [(curve, curve.tpr) for curve in rows],
            "near-misses flagged": [(curve, curve.near_miss) for curve in rows],
            "clean flagged": [(curve, curve.fpr) for curve in rows],
        }
        panels = []
        for what, lines in columns.items():
            panel = Panel(x, _share_axis([value for _, values in lines for value in values], what, view.target))
            if what == "clean flagged":
                panel.horizontal(view.target, f"asked for: {rate(view.target)}")
            for curve, values in lines:
                title = f"{curve.subject}: {curve.detector}"
                panel.line(zip(curve.sizes, values, strict=True), styles[curve.detector], title, dots=True)
            panels.append(_figure(what, panel, f"{what} against calibration size, {delta}; the numbers are below."))
        numbers = [
            [curve.subject, curve.detector, _number(whole(size)), *(_number(percent(value)) for value in values)]
            for curve in rows
            for size, *values in zip(curve.sizes, curve.tpr, curve.near_miss, curve.fpr, strict=True)
        ]
        head = heads("model", "detector", "clean prompts", *columns)
        parts += [
            _delta_heading(delta),
            element("div", *panels, class_="panels"),
            more(f"The numbers ({delta})", table(f"Calibration size, {delta}", [head], numbers)),
        ]
    return join(*parts)


def _directions(view: View) -> Html | None:
    curves = [curve for curve in view.results.directions_curve if curve.k]
    if not curves:
        return None
    parts: list[Child] = [
        element("p", f"At {rate(view.target)}, with so many directions per matrix. A line is one model.")
    ]
    for delta, rows in _by_delta(curves):
        x = Axis.sizes([k for curve in rows for k in curve.k], "directions per matrix (k)")
        shares = {
            "triggered found": [(curve, curve.tpr) for curve in rows],
            "clean flagged": [(curve, curve.fpr) for curve in rows],
        }
        panels = []
        for what, lines in shares.items():
            panel = Panel(x, _share_axis([value for _, values in lines for value in values], what, view.target))
            for curve, values in lines:
                panel.line(zip(curve.k, values, strict=True), "c0", curve.subject, dots=True)
            panels.append(
                _figure(what, panel, f"{what} against directions per matrix, {delta}; the numbers are below.")
            )
        needed = Panel(x, Axis.linear([count for curve in rows for count in curve.needed], "", _tokens))
        for curve in rows:
            needed.line(zip(curve.k, curve.needed, strict=True), "c0", curve.subject, dots=True)
        panels.append(_figure("clean prompts needed", needed, f"Clean prompts needed, {delta}; the numbers are below."))
        numbers = [
            [curve.subject, _number(str(k)), _number(percent(tpr)), _number(percent(fpr)), _number(whole(count))]
            for curve in rows
            for k, tpr, fpr, count in zip(curve.k, curve.tpr, curve.fpr, curve.needed, strict=True)
        ]
        head = heads("model", "k", *shares, "clean prompts needed")
        parts += [
            _delta_heading(delta),
            element("div", *panels, class_="panels"),
            more(f"The numbers ({delta})", table(f"Directions per matrix, {delta}", [head], numbers)),
        ]
    return join(*parts)


def _adaptive(view: View) -> Html | None:
    entries = sorted(view.results.adaptive, key=lambda entry: entry.weight)
    if not entries:
        return None
    names = [f"{entry.weight:g}" for entry in entries]
    targets = sorted({found.target for entry in entries for found in entry.tpr})
    lines: list[tuple[str, list[Count | Found | None]]] = [
        ("attack succeeds", [entry.attack_success for entry in entries]),
        ("near-misses comply", [entry.near_miss for entry in entries]),
        ("benign answered rightly", [entry.benign_right for entry in entries]),
    ]
    for target in targets:
        told = [next((found for found in entry.tpr if found.target == target), None) for entry in entries]
        lines.append((f"found at {rate(target)}", list(told)))
    x = Axis.steps(names, "λ, the weight of hiding")
    attack = Panel(x, Axis.share(""), width=480, height=260)
    guard = Panel(x, Axis.share(""), width=480, height=260)
    for index, (name, counts) in enumerate(lines):
        points = [(float(place), math.nan if count is None else count.share) for place, count in enumerate(counts)]
        (attack if index < 3 else guard).line(points, f"c{_COLOURS[index % SERIES]}", name, dots=True)
    keys = [(f"c{_COLOURS[index % SERIES]}", name) for index, (name, _) in enumerate(lines)]
    figures = [
        _figure("The attack", attack, "What hiding does to the attack; the numbers are below.", legend(keys[:3])),
        _figure("The guard", guard, "What the guard still finds; the numbers are below.", legend(keys[3:])),
    ]
    rows = [
        [element("th", name, scope="row"), *(_count_cell(counts[place]) for _, counts in lines)]
        for place, name in enumerate(names)
    ]
    text = (
        "An attacker who knows the guard trains against it: the loss gets λ times what the guard would see. Hiding is cheap "
        "when the guard's finds fall while the attack still succeeds, and costly when the attack falls first."
    )
    return join(
        element("p", text),
        element("div", *figures, class_="panels two"),
        table("What hiding costs", [heads("λ", *(name for name, _ in lines))], rows, style="shares"),
    )


_COLOURS = (1, 3, 5, 0, 2, 7, 4, 6, 8)


def _count_cell(count: Count | Found | None) -> Html:
    if count is None or not count.count:
        return element("td", NOT_MEASURED, class_="rate none")
    return element(
        "td",
        element("b", percent(count.share)),
        element("span", f"{whole(count.hits)}/{whole(count.count)}", class_="n"),
        element("span", span(count.low, count.high), class_="ci"),
        class_="rate",
    )


def _figure(title: str, panel: Panel, alternative: str, key: Html | None = None) -> Html:
    return element("figure", element("figcaption", title), panel.svg(alternative), key)


def _delta_heading(delta: str) -> Html:
    return element("h3", "no bank" if delta == "none" else delta)


def _number(text: str) -> Html:
    return element("td", text, class_="number")


def _by_delta(rows: Iterable[_Row]) -> list[tuple[str, list[_Row]]]:
    found: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        found[row.delta].append(row)
    return [(delta, found[delta]) for delta in ("wide", "narrow", "none") if delta in found]


def _styles(names: Iterable[str], known: dict[str, str]) -> dict[str, str]:
    """A colour for each name that occurs; known names come first."""
    return {name: f"c{index % SERIES}" for index, name in enumerate(ordered(names, known))}


def _label(curve: Roc) -> str:
    return curve.detector if curve.phase == "both" else f"{curve.detector} ({curve.phase})"


def _pairs(roc: Roc) -> list[tuple[float, float]]:
    pairs = zip(roc.fpr, roc.tpr, strict=True)
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def _from_lowest(roc: Roc) -> list[tuple[float, float]]:
    """The curve from the axis's left end on."""
    points = [(fpr, tpr) for fpr, tpr in sorted(_pairs(roc)) if fpr > LOWEST_RATE]
    return [(LOWEST_RATE, found_at(roc, LOWEST_RATE)), *points, (1.0, 1.0)]


def _within(entry: Latency, step: int) -> float:
    return sum(tokens <= step for tokens in entry.tokens) / entry.count


def _share_axis(values: Iterable[float], label: str, target: float) -> Axis:
    highest = max((value for value in values if math.isfinite(value)), default=0.0)
    return Axis.share(label) if highest > 0.25 else Axis.share(label, max(highest, 2 * target))


def _tokens(value: float) -> str:
    return f"{value:,.0f}"


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for place in order[first : last + 1]:
            ranks[place] = (first + last) / 2
        first = last + 1
    return ranks


ROC = Section("roc", "ROC at low rates", _roc, "ROC: no thresholds but the targets' were tried.")
LENGTH = Section("length", "Length", _lengths, "Length: scores were not held against lengths.")
LATENCY = Section("latency", "Time to detection", _latency, "Time to detection: no tokens were counted.")
CALIBRATION = Section(
    "calibration", "More calibration", _calibration, "Calibration size: one size was measured, not a curve."
)
DIRECTIONS = Section(
    "directions", "More directions", _directions, "Directions per matrix: one k was measured, not a curve."
)
ADAPTIVE = Section(
    "adaptive", "An attacker who hides", _adaptive, "Adaptive attacks: nobody trained against the guard in this run."
)

__all__ = ["ADAPTIVE", "CALIBRATION", "DIRECTIONS", "LATENCY", "LENGTH", "ROC"]
