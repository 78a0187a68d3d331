"""What more would buy: calibration prompts, and directions per matrix."""

from __future__ import annotations

from collections.abc import Sequence

from guard.evaluation.report.figures import block, by_delta, drawn, figure, mean, share_axis, styles, thousands
from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DETECTORS
from guard.evaluation.report.numbers import percent, rate, whole
from guard.evaluation.report.plots import Axis, Panel, Point, legend
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import number_cell, number_head
from guard.evaluation.report.view import View

FOUND, NEAR, CLEAN = "triggered found", "near-misses flagged", "clean flagged"


def _calibration(view: View) -> Html | None:
    curves = [curve for curve in view.results.calibration_curve if curve.sizes]
    if not curves:
        return None
    colours = styles((curve.detector for curve in curves), DETECTORS)
    parts: list[Child] = [
        element(
            "p",
            f"At {rate(view.target)}, with so many clean prompts to calibrate on. A line is the mean over the models.",
        ),
        legend((style, detector) for detector, style in colours.items()),
    ]
    for delta, rows in by_delta(curves):
        x = Axis.sizes([size for curve in rows for size in curve.sizes], "clean prompts")
        panels = []
        for what, column in ((FOUND, "tpr"), (NEAR, "near_miss"), (CLEAN, "fpr")):
            lines = {}
            for detector in reversed(colours):
                chosen = [curve for curve in drawn(view, rows) if curve.detector == detector]
                lines[detector] = _means([(curve.sizes, getattr(curve, column)) for curve in chosen])
            panel = Panel(x, share_axis((value for line in lines.values() for _, value in line), "", view.target))
            if what == CLEAN:
                panel.horizontal(view.target, f"asked for: {rate(view.target)}")
            for detector, line in lines.items():
                panel.line(line, colours[detector], detector, dots=True)
            panels.append(figure(what, panel, f"{what} by calibration size, {delta}; the numbers are below."))
        numbers = [
            [
                curve.subject,
                curve.detector,
                number_cell(whole(size)),
                *(number_cell(percent(value)) for value in values),
            ]
            for curve in rows
            for size, *values in zip(curve.sizes, curve.tpr, curve.near_miss, curve.fpr, strict=True)
        ]
        head = ("model", "detector", *map(number_head, ("clean prompts", FOUND, NEAR, CLEAN)))
        parts.append(block(delta, panels, "Calibration size", head, numbers))
    return join(*parts)


def _directions(view: View) -> Html | None:
    curves = [curve for curve in view.results.directions_curve if curve.k]
    if not curves:
        return None
    parts: list[Child] = [
        element(
            "p",
            f"At {rate(view.target)}, with so many directions per matrix. The strong line is the mean over the "
            "models, a faint one is a model.",
        )
    ]
    for delta, rows in by_delta(curves):
        x = Axis.sizes([k for curve in rows for k in curve.k], "directions per matrix (k)")
        shown = drawn(view, rows)
        panels = []
        for what, column in ((FOUND, "tpr"), (CLEAN, "fpr"), ("clean prompts needed", "needed")):
            lines = [(curve.subject, [*zip(curve.k, getattr(curve, column), strict=True)]) for curve in shown]
            values = [float(value) for _, line in lines for _, value in line]
            y = Axis.linear(values, "", thousands) if column == "needed" else share_axis(values, "", view.target)
            panel = Panel(x, y)
            if what == CLEAN:
                panel.horizontal(view.target, f"asked for: {rate(view.target)}")
            for subject, line in lines if len(lines) > 1 else ():
                panel.line(line, "c0 faint", subject)
            average = _means([(curve.k, getattr(curve, column)) for curve in shown])
            panel.line(average, "c0", "mean" if len(lines) > 1 else lines[0][0], dots=True)
            panels.append(figure(what, panel, f"{what} by directions per matrix, {delta}; the numbers are below."))
        numbers = [
            [
                curve.subject,
                number_cell(str(k)),
                number_cell(percent(tpr)),
                number_cell(percent(fpr)),
                number_cell(whole(count)),
            ]
            for curve in rows
            for k, tpr, fpr, count in zip(curve.k, curve.tpr, curve.fpr, curve.needed, strict=True)
        ]
        head = ("model", *map(number_head, ("k", FOUND, CLEAN, "clean prompts needed")))
        parts.append(block(delta, panels, "Directions per matrix", head, numbers))
    return join(*parts)


def _means(lines: Sequence[tuple[Sequence[int], Sequence[float]]]) -> list[Point]:
    """One line through the means at each place that any of the lines has."""
    places = sorted({place for places, _ in lines for place in places})
    points = {place: [dict(zip(*line, strict=True)).get(place) for line in lines] for place in places}
    return [(float(place), mean(value for value in values if value is not None)) for place, values in points.items()]


CALIBRATION = Section(
    "calibration", "More calibration", _calibration, "Calibration size: one size was measured, not a curve."
)
DIRECTIONS = Section(
    "directions", "More directions", _directions, "Directions per matrix: one k was measured, not a curve."
)
