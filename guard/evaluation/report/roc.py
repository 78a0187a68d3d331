"""ROC curves where it matters: at low false-positive rates."""

from __future__ import annotations

import math
from itertools import pairwise

from guard.evaluation.report.figures import block, by_delta, by_family, drawn, figure, mean, styles
from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DETECTORS
from guard.evaluation.report.numbers import percent, rate
from guard.evaluation.report.plots import Axis, Panel, legend
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import number_cell, number_head
from guard.evaluation.report.view import View
from guard.evaluation.results import Roc

LOWEST_RATE = 1e-3
"""Where the axis begins; what is left of it is decided by a handful of requests."""
STEPS = 60
"""Rates at which the curves of several models are averaged."""


def found_at(roc: Roc, target: float) -> float:
    """The largest share found at a false-positive rate of at most `target`; nothing is interpolated."""
    return max((tpr for fpr, tpr in _pairs(roc) if fpr <= target), default=0.0)


def area(roc: Roc) -> float:
    """Under the whole curve, straight between its points; NaN without points."""
    points = sorted(_pairs(roc))
    if not points:
        return math.nan
    corners = [(0.0, 0.0), *points, (1.0, 1.0)]
    return sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(corners))


def _roc(view: View) -> Html | None:
    curves = [curve for curve in view.results.roc if _pairs(curve)]
    if not curves:
        return None
    colours = styles((_label(curve) for curve in curves), DETECTORS)
    targets = sorted({LOWEST_RATE, *view.run.targets})
    parts: list[Child] = [
        element(
            "p",
            f"From {rate(LOWEST_RATE)} of clean requests on, logarithmic: what is found at rates that one can live "
            "with is what counts. A line is the mean over a family's models; the rule is the headline's rate.",
        ),
        legend((style, label) for label, style in colours.items()),
    ]
    for delta, rows in by_delta(curves):
        panels = [
            _panel(view, name, chosen, delta, colours) for name, chosen in by_family(view, drawn(view, rows)).items()
        ]
        head = (
            "model",
            "detector",
            *(number_head(f"found at {rate(target)}") for target in targets),
            number_head("area"),
        )
        numbers = [
            [
                curve.subject,
                _label(curve),
                *(number_cell(percent(found_at(curve, target))) for target in targets),
                number_cell(f"{area(curve):.3f}"),
            ]
            for curve in rows
        ]
        parts.append(block(delta, panels, "ROC", head, numbers))
    return join(*parts)


def _panel(view: View, family: str, curves: list[Roc], delta: str, colours: dict[str, str]) -> Html:
    panel = Panel(Axis.log(LOWEST_RATE, 1.0, "clean flagged", rate), Axis.share("triggered found"))
    panel.vertical(view.target, f"asked for: {rate(view.target)}")
    told = []
    # The first is what is served: drawn last, it lies on top.
    for label in reversed(colours):
        chosen = [curve for curve in curves if _label(curve) == label]
        if not chosen:
            continue
        rates = [LOWEST_RATE ** (1 - step / STEPS) for step in range(STEPS + 1)]
        points = [(each, mean(found_at(curve, each) for curve in chosen)) for each in rates]
        panel.stairs(points, colours[label], label)
        told.append(f"{label} {percent(mean(found_at(curve, view.target) for curve in chosen))}")
    return figure(family, panel, f"ROC, {family}, {delta}. Found at {rate(view.target)}: {', '.join(reversed(told))}.")


def _label(curve: Roc) -> str:
    return curve.detector if curve.phase == "both" else f"{curve.detector} ({curve.phase})"


def _pairs(roc: Roc) -> list[tuple[float, float]]:
    pairs = zip(roc.fpr, roc.tpr, strict=True)
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


ROC = Section("roc", "ROC at low rates", _roc, "ROC: no thresholds but the targets' were tried.")
