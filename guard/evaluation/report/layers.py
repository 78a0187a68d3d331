"""Where detection happens: which layer, and which direction of it."""

from __future__ import annotations

import math

from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DELTAS, KINDS, ordered
from guard.evaluation.report.numbers import NOT_MEASURED, percent
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import heads, more, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Layers


def _layers(view: View) -> Html | None:
    entries = [entry for entry in view.results.layers if entry.layers]
    if not entries:
        return None
    parts: list[Child] = [
        element(
            "p",
            "What share of the distance between a kind of request and clean ones lies in each layer. A row adds up "
            "to 100% when every watched layer is in it.",
        )
    ]
    for kind in ordered((entry.kind for entry in entries), KINDS):
        by_delta = {
            delta: [entry for entry in entries if (entry.delta, entry.kind) == (delta, kind)] for delta in DELTAS
        }
        told = {delta: chosen for delta, chosen in by_delta.items() if chosen}
        parts.append(element("h3", kind))
        parts.append(element("div", *(_heat(chosen, delta) for delta, chosen in told.items()), class_="pair"))
        parts += [_directions(chosen, kind, delta) for delta, chosen in told.items()]
    return join(*parts)


def _heat(entries: list[Layers], delta: str) -> Html:
    layers = sorted({layer for entry in entries for layer in entry.layers})
    rows = []
    for entry in entries:
        told = dict(zip(entry.layers, entry.share, strict=True))
        rows.append([entry.subject, *(_heat_cell(told.get(layer, math.nan)) for layer in layers)])
    return table(f"{delta}: share per layer", [heads("model", *(f"L{layer}" for layer in layers))], rows, style="heat")


def _heat_cell(share: float) -> Html:
    if not math.isfinite(share):
        return element("td", NOT_MEASURED, class_="cell none")
    tint = 0.55 * min(max(share, 0.0), 1.0) ** 0.7
    return element("td", percent(share) if share < 0.01 else f"{share:.0%}", class_="cell", style=f"--a:{tint:.3f}")


def _directions(entries: list[Layers], kind: str, delta: str) -> Html | None:
    named = [entry for entry in entries if entry.top]
    if not named:
        return None
    cards = []
    for entry in named:
        most = max((top.share for top in entry.top if math.isfinite(top.share)), default=0.0) or 1.0
        bars = []
        for top in entry.top:
            width = 100 * min(max(top.share / most, 0.0), 1.0) if math.isfinite(top.share) else 0.0
            bar = element("span", class_="bar", style=f"width:{width:.1f}%")
            bars.append(
                element(
                    "li",
                    element("code", top.direction),
                    element("span", bar, class_="rail"),
                    element("b", percent(top.share)),
                )
            )
        cards.append(element("div", element("h4", entry.subject), element("ol", *bars, class_="bars"), class_="card"))
    shown = element("div", *cards, class_="cards")
    return more(f"The directions with the largest shares ({kind}, {delta})", shown, open_=len(named) <= 3)


LAYERS = Section("layers", "Layers and directions", _layers, "Layers: it was not looked at where the distance lies.")
