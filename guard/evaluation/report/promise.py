"""The false-positive promise: what was asked for, and what came over many calibrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean, median

from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.numbers import percent, rate, span, whole
from guard.evaluation.report.plots import Axis, quantile, strip, strip_axis
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import Column, heads, more, share_cell, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Splits
from guard.intervals import binomial_tail


@cache
def binomial_band(target: float, count: int) -> tuple[float, float]:
    """Where 95% of observed rates lie when `count` requests are flagged at `target` each."""
    below = _first(lambda hits: 1 - binomial_tail(hits + 1, count, target) >= 0.025, count)
    above = _first(lambda hits: binomial_tail(hits + 1, count, target) <= 0.025, count)
    return below / count, above / count


def above_band(splits: Splits) -> float:
    """The share of calibrations whose observed rate lies above the band; 2.5% if only the count were by chance."""
    finite = [value for value in splits.rates if math.isfinite(value)]
    high = binomial_band(splits.target, splits.held_out)[1]
    return sum(value > high + 1e-9 for value in finite) / len(finite) if finite else math.nan


def _promise(view: View) -> Html | None:
    asked = _asked_and_measured(view)
    spread = _spread(view)
    return None if asked is None and spread is None else join(asked, spread)


def _asked_and_measured(view: View) -> Html | None:
    pools = {
        (target, delta): view.pool(view.attacked, delta, "clean", target=target)
        for target in view.run.targets
        for delta in view.deltas
    }
    if not any(pools.values()):
        return None
    rows = [
        [
            element("th", rate(target), scope="row"),
            *(
                share_cell(pools[target, delta], Column("clean", most=min(1.0, 4 * target or 1.0), mark=target))
                for delta in view.deltas
            ),
        ]
        for target in view.run.targets
    ]
    text = (
        "The one thing that is promised: of clean requests like calibration's, at most the rate asked for is flagged, on "
        "average over calibrations. The mark is the rate asked for."
    )
    caption = f"Clean requests flagged by {view.detector}, on one calibration per model"
    return join(element("p", text), table(caption, [heads("asked for", *view.deltas)], rows, style="shares"))


def _spread(view: View) -> Html | None:
    splits = [entry for entry in view.results.splits if entry.rates]
    if not splits:
        return None
    keys = sorted(
        {(entry.target, entry.detector, entry.delta) for entry in splits},
        key=lambda key: (key[0] != view.target, key[1] != view.detector, key[0], key[1], key[2] != "wide"),
    )
    parts: list[Child] = [
        element("h3", "Over random calibration splits"),
        element(
            "p",
            "Each dot is one rate that was observed, the larger the more often; thick: the middle half; tall: the mean; "
            "the rule: the rate asked for. Shaded is where 95% of observed rates would lie if every calibration kept "
            "exactly that rate and only the count of held-out requests were by chance. Calibrations differ, so more than "
            "2.5% of them lie above: the promise is about the mean.",
        ),
    ]
    for target, detector, delta in keys:
        chosen = [entry for entry in splits if (entry.target, entry.detector, entry.delta) == (target, detector, delta)]
        shown = _strips(chosen, f"{detector} at {rate(target)}, {delta}")
        first = (target, detector) == keys[0][:2]
        parts.append(shown if first else more(f"{detector} at {rate(target)}, {delta}", shown))
    return join(*parts)


def _strips(splits: Sequence[Splits], caption: str) -> Html:
    target = splits[0].target
    bands = [binomial_band(entry.target, entry.held_out) for entry in splits]
    values = [value for entry in splits for value in entry.rates if math.isfinite(value)]
    axis = Axis.linear([*values, *(high for _, high in bands), target], "", rate)
    rows = []
    for entry, band in zip(splits, bands, strict=True):
        finite = sorted(value for value in entry.rates if math.isfinite(value))
        mean, middle = (fmean(finite), median(finite)) if finite else (math.nan, math.nan)
        reach = span(quantile(finite, 0.05), quantile(finite, 0.95)) if finite else "–"
        told = f"{entry.subject}: mean {percent(mean)}, 5th to 95th percentile {reach}, asked for {rate(target)}"
        rows.append(
            [
                entry.subject,
                element("td", strip(finite, axis, target, band, told), class_="strip"),
                _number(percent(mean)),
                _number(percent(middle)),
                _number(reach),
                _number(percent(above_band(entry))),
                _number(f"{len(finite)} × {whole(entry.held_out)}"),
            ]
        )
    head = heads(
        "model",
        element("th", strip_axis(axis), element("span", "observed false-positive rate", class_="unseen"), scope="col"),
        "mean",
        "median",
        "5th–95th percentile",
        "above the band",
        "splits × held out",
    )
    return table(caption, [head], rows, style="strips")


def _number(text: str) -> Html:
    return element("td", text, class_="number")


def _first(holds: Callable[[int], bool], count: int) -> int:
    """The least of 0..count for which a test that stays true holds, by bisection."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


PROMISE = Section(
    "promise",
    "The false-positive promise",
    _promise,
    "The promise: neither clean requests nor repeated calibrations were measured.",
)
