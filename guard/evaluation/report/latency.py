"""How far a triggered request gets before it is flagged."""

from __future__ import annotations

from guard.evaluation.report.figures import block, by_delta, by_family, drawn, figure, mean, styles, thousands
from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DETECTORS
from guard.evaluation.report.numbers import percent, whole
from guard.evaluation.report.plots import Axis, Panel, legend
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import number_cell, number_head
from guard.evaluation.report.view import View
from guard.evaluation.results import Latency

COUNTED = (0, 1, 4, 16)
"""Tokens after which the numbers say how much was found."""


def _latency(view: View) -> Html | None:
    entries = [entry for entry in view.results.latency if entry.count]
    if not entries:
        return None
    colours = styles((entry.detector for entry in entries), DETECTORS)
    last = max(5, *(max(entry.tokens, default=0) for entry in entries))
    parts: list[Child] = [
        element(
            "p",
            "Triggered requests that were found after so many generated tokens; at 0, on the prompt, before the "
            "model said anything. A line is the mean over a family's models.",
        ),
        legend((style, detector) for detector, style in colours.items()),
    ]
    for delta, rows in by_delta(entries):
        panels = []
        for family, chosen in by_family(view, drawn(view, rows)).items():
            x = Axis.linear([last], "tokens generated", thousands)
            panel = Panel(x, Axis.share("found"))
            told = []
            for detector in reversed(colours):
                same = [entry for entry in chosen if entry.detector == detector]
                steps = sorted({0, last, *(token for entry in same for token in entry.tokens)})
                points = [(float(step), mean(_within(entry, step) for entry in same)) for step in steps]
                panel.stairs([*points, (x.high, points[-1][1])], colours[detector], detector)
                told += [f"{detector} {percent(points[0][1])}"] if same else []
            panels.append(
                figure(family, panel, f"Latency, {family}, {delta}. On the prompt: {', '.join(reversed(told))}.")
            )
        columns = ("on the prompt", *(f"by token {step}" for step in COUNTED[1:]), "never", "requests")
        head = ("model", "detector", *map(number_head, columns))
        numbers = [
            [
                entry.subject,
                entry.detector,
                *(number_cell(percent(_within(entry, step))) for step in COUNTED),
                number_cell(whole(entry.undetected)),
                number_cell(whole(entry.count)),
            ]
            for entry in rows
        ]
        parts.append(block(delta, panels, "Latency", head, numbers))
    return join(*parts)


def _within(entry: Latency, step: int) -> float:
    return sum(tokens <= step for tokens in entry.tokens) / entry.count


LATENCY = Section("latency", "Time to detection", _latency, "Time to detection: no tokens were counted.")
