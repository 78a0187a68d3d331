"""What hiding from the guard costs an attacker who trains against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guard.evaluation.report.figures import figure
from guard.evaluation.report.headline import HEADLINE_KINDS, listed, share_table
from guard.evaluation.report.markup import Html, element, join
from guard.evaluation.report.numbers import rate
from guard.evaluation.report.plots import SERIES, Axis, Panel, legend
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import counted_cell, heads, more, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Counted

Line = tuple[str, Sequence[Counted | None]]
"""What was counted, at each weight of hiding."""


def _adaptive(view: View) -> Html | None:
    entries = sorted(view.results.adaptive, key=lambda entry: entry.weight)
    if not entries:
        return None
    attack: list[Line] = [
        ("attack succeeds", [entry.attack_success for entry in entries]),
        ("near-misses comply", [entry.near_miss for entry in entries]),
        ("benign answered rightly", [entry.benign_right for entry in entries]),
    ]
    guard: list[Line] = []
    for target in sorted({found.target for entry in entries for found in entry.tpr}):
        told = [next((found for found in entry.tpr if found.target == target), None) for entry in entries]
        guard.append((f"found at {rate(target)}", told))
    names = [f"{entry.weight:g}" for entry in entries]
    figures = [
        _figure("The attack", names, attack, first=1),
        _figure("The guard", names, guard, first=4),
    ]
    rows = [
        [element("th", name, scope="row"), *(counted_cell(counts[place]) for _, counts in (*attack, *guard))]
        for place, name in enumerate(names)
    ]
    text = (
        "An attacker who knows the guard trains against it: \u03bb times what the guard would see is added to the "
        "loss. Hiding is cheap where what is found falls while the attack still succeeds; it is dear where the "
        "attack falls first."
    )
    return join(
        element("p", text),
        element("div", *figures, class_="panels two"),
        table("What hiding costs", [heads("\u03bb", *(name for name, _ in (*attack, *guard)))], rows, style="shares"),
        _each(view),
    )


def _figure(title: str, names: Sequence[str], lines: Sequence[Line], first: int) -> Html:
    panel = Panel(Axis.steps(names, "\u03bb, the weight of hiding"), Axis.share(""), width=480, height=260)
    keys = [(f"c{(first + index) % SERIES}", name) for index, (name, _) in enumerate(lines)]
    for (style, name), (_, counts) in zip(keys, lines, strict=True):
        points = [(float(place), math.nan if told is None else told.share) for place, told in enumerate(counts)]
        panel.line(points, style, name, dots=True)
    return figure(title, panel, f"{title}, by the weight of hiding; the numbers are below.", legend(keys))


def _each(view: View) -> Html | None:
    subjects = view.of_kind("adaptive")
    if not subjects or not view.results.rates:
        return None
    caption = f"{view.detector} at {rate(view.target)}, each adaptive model"
    return more("What is flagged in each", share_table(view, caption, ("model",), listed(subjects), HEADLINE_KINDS))


ADAPTIVE = Section(
    "adaptive", "An attacker who hides", _adaptive, "Adaptive attacks: nobody trained against the guard in this run."
)
