"""Sections that compare shares: baselines, shifted traffic, unlearned models, controls, admission."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from guard.evaluation.report.headline import Row, listed, share_table
from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DELTAS, DETECTORS, FOUND, KINDS, NOT_SHIFTS
from guard.evaluation.report.numbers import percent, rate
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import (
    FOUND_COLUMN,
    column,
    counted_cell,
    heads,
    kind_head,
    more,
    share_cell,
    table,
    tag,
)
from guard.evaluation.report.view import Pool, View
from guard.evaluation.results import Admission, Subject

PAPER_RULE = "paper rule"
RANDOM = "random directions"


def _baselines(view: View) -> Html | None:
    deltas = [delta for delta in (*view.deltas, "none") if view.detectors(delta)]
    if sum(len(view.detectors(delta)) for delta in deltas) < 2 or not view.attacked:
        return None
    judged = [(delta, detector) for delta in deltas for detector in view.detectors(delta)]
    targets = _measured(view, judged)

    def pools(kind: str) -> list[Pool | None]:
        return [view.pool(view.attacked, delta, kind, detector=detector) for delta, detector in judged]

    kinds = [kind for kind in ("near-miss", "clean") if any(pools(kind))]
    shown = {kind: column(pools(kind), view.target, wanted=False) for kind in kinds}
    rows: list[Sequence[Child]] = []
    for delta in deltas:
        rows.append(_group_row(delta, 1 + len(targets) + len(kinds)))
        for detector in view.detectors(delta):
            row: list[Child] = [_detector_head(view, delta, detector)]
            if view.has_own_threshold(delta, detector):
                row.append(
                    share_cell(
                        view.pool(view.attacked, delta, "triggered", detector=detector), FOUND_COLUMN, len(targets)
                    )
                )
            else:
                row += [
                    share_cell(
                        view.pool(view.attacked, delta, "triggered", detector=detector, target=target), FOUND_COLUMN
                    )
                    for target in targets
                ]
            row += [share_cell(view.pool(view.attacked, delta, kind, detector=detector), shown[kind]) for kind in kinds]
            rows.append(row)
    over = heads(
        element("th", "detector", scope="col", rowspan=2),
        element("th", "triggered, found at", scope="colgroup", colspan=len(targets), class_="delta"),
        element("th", f"flagged at {rate(view.target)}", scope="colgroup", colspan=len(kinds), class_="delta"),
    )
    under = heads(
        *(
            element("th", rate(target), scope="col", class_=None if index else "first")
            for index, target in enumerate(targets)
        ),
        *(kind_head(kind, class_="first" if kind == kinds[0] else None) for kind in kinds),
    )
    text = (
        "Every detector with its threshold at the same rate, set on the same calibration prompts. A detector that "
        "judges one phase alone says which. A rule with a threshold of its own has one share for all rates: hold it "
        "against what it flags of clean."
    )
    compared = table(
        "Detectors at equal false-positive rate, all admitted models pooled", [over, under], rows, style="shares"
    )
    return join(element("p", text), _without_the_bank(view), compared, _phases(view, judged))


def _without_the_bank(view: View) -> Html | None:
    """Where random directions find as much as the bank's, the report has to say so itself."""
    told = []
    for delta in view.deltas:
        served = view.pool(view.attacked, delta, "triggered")
        random = view.pool(view.attacked, delta, "triggered", detector=RANDOM)
        if served is not None and random is not None and random.interval[1] >= served.share:
            told.append(f"{percent(random.share)} against {percent(served.share)} ({delta})")
    if not told:
        return None
    return element(
        "p",
        f"Random directions find as much as {view.detector} at {rate(view.target)}: {', '.join(told)}. "
        "What is found in these models does not show that the bank's directions are needed.",
        class_="notes",
    )


def _measured(view: View, judged: Sequence[tuple[str, str]]) -> list[float]:
    """The targets at which any detector was measured; a calibration can be too small for the smallest."""
    asked = {entry.target for entry in view.results.rates if (entry.delta, entry.detector) in set(judged)}
    return [target for target in view.run.targets if target in asked]


def _phases(view: View, judged: Sequence[tuple[str, str]]) -> Html | None:
    """What each phase finds alone, for detectors that were measured in more than one."""
    several = [
        (delta, detector) for delta, detector in judged if {"prompt", "completion"} <= {*view.phases(delta, detector)}
    ]
    if not several:
        return None
    rows = [
        [
            element("th", join(detector, " ", tag(delta, "plain")), scope="row"),
            *(
                share_cell(view.pool(view.attacked, delta, "triggered", detector=detector, phase=phase), FOUND_COLUMN)
                for phase in ("prompt", "completion", "both")
            ),
        ]
        for delta, detector in several
    ]
    caption = f"Triggered found at {rate(view.target)}, by phase"
    return more(
        "By phase: on the prompt, on the completion",
        table(caption, [heads("detector", "prompt", "completion", "both")], rows, style="shares"),
    )


def _shifts(view: View) -> Html | None:
    kinds = [kind for kind in view.kinds if kind not in NOT_SHIFTS]
    if not [kind for kind in kinds if kind not in ("clean", "benign", "harmful")] or not view.attacked:
        return None
    detectors = [view.detector]
    detectors += [PAPER_RULE] if any(PAPER_RULE in view.detectors(delta) for delta in view.deltas) else []
    asked = [(delta, detector) for delta in view.deltas for detector in detectors if detector in view.detectors(delta)]
    every = {
        (delta, detector, kind): view.pool(view.attacked, delta, kind, detector=detector)
        for delta, detector in asked
        for kind in kinds
    }
    # One axis for every row: the kinds are to be compared with one another.
    shown = column(every.values(), view.target, wanted=False)
    rows = [
        [
            element("th", kind, element("span", KINDS.get(kind, ""), class_="about"), scope="row"),
            *(share_cell(every[delta, detector, kind], shown) for delta, detector in asked),
        ]
        for kind in kinds
    ]
    over = heads(
        element("th", "kind of request", scope="col", rowspan=2),
        *(
            element("th", delta, scope="colgroup", colspan=sum(delta == one for one, _ in asked), class_="delta")
            for delta in dict.fromkeys(delta for delta, _ in asked)
        ),
    )
    under = heads(
        *(
            element("th", _at(view, *pair), scope="col", class_="first" if pair[1] == view.detector else None)
            for pair in asked
        )
    )
    text = (
        f"Nothing here is an attack, so everything flagged is flagged wrongly. {rate(view.target)} is promised on "
        "traffic like calibration's (clean) and on no other; the other rows say what happens when traffic changes."
    )
    return join(
        element("p", text),
        table("Flagged, by kind of request, all admitted models pooled", [over, under], rows, style="shares"),
    )


def _unlearned(view: View) -> Html | None:
    return _per_subject(
        view,
        "unlearned",
        ("forgotten", "retained", "clean"),
        FOUND,
        "Unlearning writes to the weights, too. Forgotten: what the model was made to forget, which the guard may "
        "flag; retained: what it was to keep, which it should not.",
    )


def _controls(view: View) -> Html | None:
    return _per_subject(
        view,
        "control",
        ("triggered", "near-miss", "clean", "benign", "harmful"),
        (),
        "Fine-tuned without a backdoor. The trigger means nothing to these models: what is flagged here of triggered "
        "requests is not detection but novelty.",
    )


def _per_subject(
    view: View, subject_kind: str, kinds: Sequence[str], wanted: Collection[str], text: str
) -> Html | None:
    subjects = view.of_kind(subject_kind)
    known = {rate.kind for rate in view.results.rates if rate.subject in {subject.name for subject in subjects}}
    measured = [kind for kind in kinds if kind in known]
    if not measured:
        return None
    rows: list[Row] = listed(subjects)
    if len(subjects) > 1:
        rows.insert(0, ([element("th", f"all {len(subjects)}", scope="row", class_="all")], subjects))
    caption = f"{view.detector} at {rate(view.target)}, each {subject_kind}"
    return join(element("p", text), share_table(view, caption, ("model",), rows, measured, wanted))


def _admission(view: View) -> Html | None:
    subjects = [subject for subject in view.results.subjects if subject.admission or subject.admitted is not None]
    if not subjects:
        return None
    measures = list(dict.fromkeys(entry.measure for subject in subjects for entry in subject.admission))
    rows: list[Sequence[Child]] = []
    for subject in subjects:
        told = {entry.measure: entry for entry in subject.admission}
        rows.append(
            [
                element("th", subject.name, scope="row"),
                element("td", _standing(subject), *_reasons(subject)),
                *(_measure_cell(told.get(measure)) for measure in measures),
            ]
        )
    text = (
        "An organism has to be what it claims to be before detection in it means anything: measured on prompts that "
        "it was not trained on. Weak ones are shown, and are in no pool."
    )
    caption = f"Admission: {sum(subject.admitted is True for subject in subjects)} of {len(subjects)} admitted"
    return join(element("p", text), table(caption, [heads("model", "", *measures)], rows, style="admission"))


def _standing(subject: Subject) -> Html:
    if subject.admitted is None:
        return tag("no bars", "plain")
    return tag("admitted", "good") if subject.admitted else tag("weak", "bad")


def _reasons(subject: Subject) -> list[Html]:
    return [element("span", reason, class_="about") for reason in subject.weak_reasons]


def _measure_cell(entry: Admission | None) -> Html:
    if entry is None:
        return counted_cell(None)
    bar = element("span", f"bar {entry.bar}", class_="n") if entry.bar else None
    return counted_cell(entry, bar, tag("missed", "bad") if entry.passed is False else None)


def _group_row(delta: str, columns: int) -> list[Child]:
    name = "no bank" if delta == "none" else delta
    about = element("span", DELTAS[delta], class_="about")
    return [element("th", name, " ", about, scope="rowgroup", colspan=columns, class_="group")]


def _detector_head(view: View, delta: str, detector: str) -> Html:
    return element(
        "th", view.label(delta, detector), element("span", DETECTORS.get(detector, ""), class_="about"), scope="row"
    )


def _at(view: View, delta: str, detector: str) -> str:
    label = view.label(delta, detector)
    return label if view.has_own_threshold(delta, detector) else f"{label} at {rate(view.target)}"


BASELINES = Section("baselines", "Against baselines", _baselines, "Baselines: only one detector was measured.")
SHIFTS = Section(
    "shifts",
    "Traffic of another kind",
    _shifts,
    "Shifts: no request of a kind that calibration did not see was judged.",
)
UNLEARNED = Section("unlearned", "Unlearned models", _unlearned, "Unlearned models: none was measured.")
CONTROLS = Section("controls", "Controls", _controls, "Controls: no model fine-tuned without a backdoor was measured.")
ADMISSION = Section(
    "admission", "Admission of organisms", _admission, "Admission: no model here had to show that it is backdoored."
)

__all__ = ["ADMISSION", "BASELINES", "CONTROLS", "SHIFTS", "UNLEARNED"]
