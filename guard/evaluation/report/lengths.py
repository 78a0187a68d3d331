"""Does a long request score higher for being long?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from guard.evaluation.report.figures import by_delta, figure, styles, thousands
from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DETECTORS, KINDS, ordered
from guard.evaluation.report.numbers import DASH, NOT_MEASURED, plain, plural, rate, whole
from guard.evaluation.report.plots import Axis, Panel, legend
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import heads, more, number_cell, number_head, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Lengths


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, from -1 to 1; NaN where one side does not vary."""
    if len(pairs) < 3:
        return math.nan
    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) - 1) / 2
    spread = math.sqrt(sum((a - middle) ** 2 for a in left) * sum((b - middle) ** 2 for b in right))
    return sum((a - middle) * (b - middle) for a, b in zip(left, right, strict=True)) / spread if spread else math.nan


def _lengths(view: View) -> Html | None:
    entries = [entry for entry in view.results.lengths if entry.points]
    if not entries:
        return None
    colours = styles((point.kind for entry in entries for point in entry.points), KINDS)
    detectors = ordered((entry.detector for entry in entries), DETECTORS)
    parts: list[Child] = [
        element("p", f"Each dot is a request; the rule is the threshold at {rate(view.target)}."),
        legend(((style, kind) for kind, style in colours.items()), dots=True),
    ]
    for delta, rows in by_delta(entries):
        parts.append(element("h3", "no bank" if delta == "none" else delta))
        for detector in detectors:
            chosen = [entry for entry in rows if entry.detector == detector]
            panels = element("div", *(_panel(entry, colours) for entry in chosen), class_="panels")
            if chosen:
                shown = more(f"{detector}, {plural(len(chosen), 'model')}", panels, open_=detector == detectors[0])
                parts.append(shown if len(detectors) > 1 else panels)
        head = heads(
            "model",
            "detector",
            "kind",
            *map(number_head, ("requests", "tokens", "median score", "above threshold", "rank correlation")),
        )
        numbers = [
            _row(entry, kind) for entry in rows for kind in colours if any(point.kind == kind for point in entry.points)
        ]
        parts.append(more(f"The numbers ({delta})", table(f"Length and score, {delta}", [head], numbers)))
    return join(*parts)


def _panel(entry: Lengths, colours: dict[str, str]) -> Html:
    tokens = [point.tokens for point in entry.points]
    shortest, longest = max(1, min(tokens)), max(1, *tokens)
    wide = longest > 8 * shortest
    x = Axis.log(shortest, longest, "tokens", thousands) if wide else Axis.linear(tokens, "tokens", thousands)
    panel = Panel(x, Axis.linear([*(point.score for point in entry.points), entry.threshold], "score"))
    # What there is most of goes below.
    for kind in sorted(colours, key=lambda kind: -sum(point.kind == kind for point in entry.points)):
        panel.scatter(
            [(point.tokens, point.score) for point in entry.points if point.kind == kind], colours[kind], kind
        )
    panel.horizontal(entry.threshold, f"threshold {plain(entry.threshold)}")
    told = (
        f"Score of {entry.detector} against length in {entry.subject}: {len(tokens)} requests; the numbers are below."
    )
    return figure(entry.subject, panel, told)


def _row(entry: Lengths, kind: str) -> list[Child]:
    points = [(point.tokens, point.score) for point in entry.points if point.kind == kind]
    finite = [pair for pair in points if math.isfinite(pair[1])]
    lengths = [tokens for tokens, _ in points]
    above = sum(score > entry.threshold for _, score in finite)
    correlation = rank_correlation(finite)
    return [
        entry.subject,
        entry.detector,
        kind,
        number_cell(whole(len(points))),
        number_cell(f"{whole(min(lengths))}{DASH}{whole(max(lengths))}"),
        number_cell(plain(median(score for _, score in finite)) if finite else NOT_MEASURED),
        number_cell(f"{whole(above)}/{whole(len(finite))}" if math.isfinite(entry.threshold) else NOT_MEASURED),
        number_cell(f"{correlation:+.2f}" if math.isfinite(correlation) else NOT_MEASURED),
    ]


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


LENGTH = Section("length", "Length", _lengths, "Length: scores were not held against lengths.")
