"""The first tables as Markdown, for a README."""

from __future__ import annotations

import re
from collections.abc import Sequence

from guard.evaluation.report.headline import HEADLINE_KINDS, sentence
from guard.evaluation.report.names import method
from guard.evaluation.report.numbers import NOT_MEASURED, rate, whole
from guard.evaluation.report.view import Pool, View
from guard.evaluation.results import Results, Subject


def markdown(results: Results) -> str:
    """The sentence, the caveats, the goals, the table by family and method, and the detectors at equal rate."""
    view = View(results)
    parts = ["".join(f"**{_plain(text)}**" if stressed else _plain(text) for text, stressed in sentence(view))]
    if results.run.notes:
        parts.append("\n".join(f"- {_plain(note)}" for note in results.run.notes))
    if results.bars:
        marks = {True: "met", False: "missed", None: "not measured"}
        rows = [[_plain(bar.what), _plain(bar.bar), _plain(bar.got), marks[bar.passed]] for bar in results.bars]
        parts.append(_table(["goal", "bar", "measured", ""], rows))
    if view.attacked and results.rates:
        parts.append(
            "Cells: flagged / requests = share [95% interval over requests, Clopper and Pearson], of "
            f"{_plain(view.detector)} at {rate(view.target)}."
        )
    for delta in view.deltas:
        parts += [f"### {delta}, by family and method", _by_family(view, delta)]
        if len(view.detectors(delta)) > 1:
            parts += [f"### {delta}, detectors at {rate(view.target)}", _detectors(view, delta)]
    if view.detectors("none"):
        parts += [f"### without a bank, detectors at {rate(view.target)}", _detectors(view, "none")]
    return "\n\n".join(parts) + "\n"


def _by_family(view: View, delta: str) -> str:
    rows = []
    for group in view.groups:
        shares = _shares(view, group.subjects, delta, view.detector)
        rows.append(
            [_plain(group.family), _plain(method(group.method)) or NOT_MEASURED, str(len(group.subjects)), *shares]
        )
    if len(view.groups) > 1:
        rows.append(["all", "", str(len(view.attacked)), *_shares(view, view.attacked, delta, view.detector)])
    return _table(["family", "method", "models", *HEADLINE_KINDS], rows)


def _detectors(view: View, delta: str) -> str:
    rows = []
    for detector in view.detectors(delta):
        label = _plain(view.label(delta, detector))
        label += ", own threshold" if view.has_own_threshold(delta, detector) else ""
        rows.append([label, *_shares(view, view.attacked, delta, detector)])
    return _table(["detector", *HEADLINE_KINDS], rows)


def _shares(view: View, subjects: Sequence[Subject], delta: str, detector: str) -> list[str]:
    return [_cell(view.pool(subjects, delta, kind, detector=detector)) for kind in HEADLINE_KINDS]


def _cell(pool: Pool | None) -> str:
    if pool is None:
        return NOT_MEASURED
    low, high = pool.interval
    return f"{whole(pool.hits)}/{whole(pool.count)} = {pool.share:.1%} [{low:.1%}, {high:.1%}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    text = re.sub(r"\s", " ", text)
    return re.sub(r"[\\`*_|]|<(?=[A-Za-z/!?])", r"\\\g<0>", text)
