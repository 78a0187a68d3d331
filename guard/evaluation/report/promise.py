"""The false-positive promise: what was asked for, and what came over many calibrations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.numbers import NOT_MEASURED, percent, rate, span, whole
from guard.evaluation.report.plots import Axis, quantile, strip, strip_axis
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import Column, heads, more, number_cell, number_head, share_cell, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Splits, interval


def band(splits: Splits) -> tuple[float, float]:
    """The 95% interval of one test of this size that meets the target exactly."""
    return interval(round(splits.target * splits.held_out), splits.held_out)


def above_band(splits: Splits) -> float:
    """The share of calibrations whose observed rate lies above the band."""
    finite = [value for value in splits.rates if math.isfinite(value)]
    high = band(splits)[1]
    return sum(value > high for value in finite) / len(finite) if finite else math.nan


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
    measured = [target for target in view.run.targets if any(pools[target, delta] for delta in view.deltas)]
    rows = [
        [
            element("th", rate(target), scope="row"),
            *(
                share_cell(pools[target, delta], Column(wanted=False, most=min(1.0, 4 * target or 1.0), mark=target))
                for delta in view.deltas
            ),
        ]
        for target in measured
    ]
    left = [rate(target) for target in view.run.targets if target not in measured]
    text = (
        "The one thing that is promised: of clean requests like calibration's, at most the rate asked for is "
        "flagged, on average over calibrations. The mark is the rate asked for."
    )
    if left:
        text += f" Not measured: {', '.join(left)}. A small rate needs many held-out prompts."
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
            "Each dot is one rate that was observed, the larger the more often; thick: the middle half; tall: the "
            "mean; the rule: the rate asked for. Shaded is the 95% interval of one test of this size that meets "
            "that rate exactly. Calibrations differ, too, so more rates than 5% lie outside of it: the "
            "promise is about the mean.",
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
    bands = [band(entry) for entry in splits]
    values = [value for entry in splits for value in entry.rates if math.isfinite(value)]
    axis = Axis.linear([*values, *(high for _, high in bands), target], "", rate)
    rows = []
    for entry, reach in zip(splits, bands, strict=True):
        finite = sorted(value for value in entry.rates if math.isfinite(value))
        mean, center = (fmean(finite), median(finite)) if finite else (math.nan, math.nan)
        most = span(quantile(finite, 0.05), quantile(finite, 0.95)) if finite else NOT_MEASURED
        told = f"{entry.subject}: mean {percent(mean)}, 5th to 95th percentile {most}%, asked for {rate(target)}"
        rows.append(
            [
                entry.subject,
                element("td", strip(finite, axis, target, reach, told), class_="strip"),
                number_cell(percent(mean)),
                number_cell(percent(center)),
                number_cell(most),
                number_cell(percent(above_band(entry))),
                number_cell(whole(len(finite))),
                number_cell(whole(entry.held_out)),
            ]
        )
    head = heads(
        "model",
        element("th", strip_axis(axis), element("span", "observed false-positive rate", class_="unseen"), scope="col"),
        *map(number_head, ("mean", "median", "middle 90%", "above the band", "splits", "tested on")),
    )
    return table(caption, [head], rows, style="strips")


PROMISE = Section(
    "promise",
    "The false-positive promise",
    _promise,
    "The promise: neither clean requests nor repeated calibrations were measured.",
)
