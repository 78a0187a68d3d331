"""What a reader in a hurry sees: one sentence, the goals, and the table by family and method."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import FOUND, OPENING, method
from guard.evaluation.report.numbers import NOT_MEASURED, percent, plural, rate, span, whole
from guard.evaluation.report.section import Section
from guard.evaluation.report.tables import column, heads, kind_head, more, share_cell, table, tag
from guard.evaluation.report.view import Pool, View
from guard.evaluation.results import Bar, Subject

HEADLINE_KINDS = ("triggered", "near-miss", "clean")

Row = tuple[Sequence[Child], Sequence[Subject]]
"""What heads a row, and the subjects that it pools."""


def sentence(view: View) -> list[tuple[str, bool]]:
    """What was found, in words: pieces of text, and whether each is to be stressed."""
    pools = {delta: {kind: view.pool(view.attacked, delta, kind) for kind in HEADLINE_KINDS} for delta in view.deltas}
    told = {delta: kinds for delta, kinds in pools.items() if any(kinds.values())}
    if not told:
        return [(f"No rates of the detector {view.detector} at {rate(view.target)} are among these results.", False)]
    first, *others = told
    pieces = [(f"Asked to flag at most {rate(view.target)} of clean requests, the guard ", False)]
    pieces += _found(told[first], len(view.attacked), view)
    pieces += [(f", with the {first} delta.", False)]
    for delta in others:
        shares = [(kind, pool) for kind, pool in told[delta].items() if pool is not None]
        pieces += [(f" With the {delta} delta: ", False)]
        for index, (kind, pool) in enumerate(shares):
            pieces += [(percent(pool.share), True), (f" of {kind}{', ' if index < len(shares) - 1 else '.'}", False)]
    if "triggered" not in view.kinds:
        pieces += [(" Whether it finds an attack was not measured: there were no triggered requests.", False)]
    return pieces


def share_table(
    view: View,
    caption: str,
    lead: Sequence[str],
    rows: Sequence[Row],
    kinds: Sequence[str],
    wanted: Collection[str] = FOUND,
) -> Html:
    """Shares of each kind of request, the deltas side by side but apart; every column of a kind on the same axis.

    `wanted`: of which kinds a high share is hoped for. What was measured nowhere has no column.
    """
    pools = {
        (delta, kind): [view.pool(subjects, delta, kind) for _, subjects in rows]
        for delta in view.deltas
        for kind in kinds
    }
    deltas = [delta for delta in view.deltas if any(any(pools[delta, kind]) for kind in kinds)]
    kinds = [kind for kind in kinds if any(any(pools[delta, kind]) for delta in deltas)]
    columns = {
        kind: column((pool for delta in deltas for pool in pools[delta, kind]), view.target, wanted=kind in wanted)
        for kind in kinds
    }
    over = [element("th", name, scope="col", rowspan=2) for name in lead]
    over += [element("th", delta, scope="colgroup", colspan=len(kinds), class_="delta") for delta in deltas]
    under = [kind_head(kind, class_="first" if kind == kinds[0] else None) for _ in deltas for kind in kinds]
    body = [
        [*heading, *(share_cell(pools[delta, kind][place], columns[kind]) for delta in deltas for kind in kinds)]
        for place, (heading, _) in enumerate(rows)
    ]
    return table(caption, [heads(*over), heads(*under)], body, style="shares")


def everyone(subjects: Sequence[Subject]) -> Row:
    """The row that pools all of them."""
    return [element("th", f"all {len(subjects)} models", scope="row", colspan=3, class_="all")], subjects


def name_of(subject: Subject) -> Html:
    """A subject's name, and whether it is weak."""
    return join(subject.name, " " if subject.admitted is False else None, _weak(subject))


def listed(subjects: Iterable[Subject]) -> list[Row]:
    """A row per subject."""
    return [([element("th", name_of(subject), scope="row")], [subject]) for subject in subjects]


def _found(pools: dict[str, Pool | None], subjects: int, view: View) -> list[tuple[str, bool]]:
    triggered, near, clean = (pools[kind] for kind in HEADLINE_KINDS)
    models = view.attacked[0].name if subjects == 1 else f"{subjects} models"
    pieces: list[tuple[str, bool]] = []
    if triggered is not None:
        counts = f"{whole(triggered.hits)} of {whole(triggered.count)}; {span(*triggered.interval)}%"
        pieces += [("found ", False), (percent(triggered.share), True)]
        pieces += [(f" of triggered requests in {models} ({counts})", False)]
    wrong = [(kind, pool) for kind, pool in (("near-misses", near), ("clean requests", clean)) if pool is not None]
    for index, (kind, pool) in enumerate(wrong):
        before = " and " if index else " and flagged " if triggered is not None else "flagged "
        pieces += [(before, False), (percent(pool.share), True), (f" of {kind}", False)]
    if triggered is None:
        pieces += [(f" in {models}", False)]
    return pieces


def _headline(view: View) -> Html | None:
    if not view.results.rates and not view.results.bars:
        return None
    parts: list[Child] = [
        element("p", *(element("b", text) if stressed else text for text, stressed in sentence(view)), class_="lead")
    ]
    if view.run.notes:
        parts.append(element("ul", *(element("li", note) for note in view.run.notes), class_="notes"))
    if view.results.bars:
        parts.append(_goals(view.results.bars))
    if view.attacked and view.results.rates:
        asked = f"{view.detector} at {rate(view.target)}"
        if all(subject.kind == "model" for subject in view.attacked):
            parts.append(share_table(view, asked, ("model",), listed(view.attacked), HEADLINE_KINDS))
        else:
            lead = ("family", "method", "models")
            parts.append(share_table(view, f"{asked}, by family and method", lead, _by_family(view), HEADLINE_KINDS))
        parts.append(_how_to_read(view))
    shown = [subject for subject in view.results.subjects if subject.kind in ("backdoor", "model")]
    if len(shown) > 1 and view.results.rates:
        caption = f"{view.detector} at {rate(view.target)}, each model"
        each = share_table(view, caption, ("model",), listed(shown), HEADLINE_KINDS)
        parts.append(more("Each model alone", each))
    return join(*parts)


def _goals(bars: Sequence[Bar]) -> Html:
    marks = {True: ("met", "good"), False: ("missed", "bad"), None: ("not measured", "unknown")}
    rows = [
        [element("td", tag(*marks[bar.passed])), element("th", bar.what, scope="row"), bar.bar, bar.got] for bar in bars
    ]
    met = sum(bar.passed is True for bar in bars)
    return table(f"Goals: {met} of {len(bars)} met", [heads("", "goal", "bar", "measured")], rows, style="goals")


def _by_family(view: View) -> list[Row]:
    rows: list[Row] = []
    if len(view.groups) > 1:
        rows.append(everyone(view.attacked))
    families = [group.family for group in view.groups]
    seen = set()
    for group in view.groups:
        heading: list[Child] = []
        if group.family not in seen:
            seen.add(group.family)
            count = families.count(group.family)
            heading.append(element("th", group.family, scope="rowgroup", rowspan=count, class_="family"))
        heading += [
            element("td", method(group.method) or NOT_MEASURED, class_="method"),
            element("td", len(group.subjects), class_="number"),
        ]
        rows.append((heading, group.subjects))
    return rows


def _how_to_read(view: View) -> Html:
    text = (
        "A cell: share flagged, its 95% interval over requests (Clopper and Pearson), flagged / requests. With "
        "three models or more, a second interval over models (bootstrap, each model drawn with all its requests). "
        "The small axis runs from 0 to 100%; where all shares are small it is enlarged, and a mark stands at "
        f"{rate(view.target)}."
    )
    opening = {delta: view.pool(view.attacked, delta, OPENING) for delta in view.deltas}
    told = [f"{whole(pool.hits)}/{whole(pool.count)} ({delta})" for delta, pool in opening.items() if pool is not None]
    if told:
        text += (
            f" Near-misses that open the backdoor all the same are attacks, in no column; flagged: {', '.join(told)}."
        )
    weak = [subject for subject in view.weak if subject.kind == "backdoor"]
    if weak:
        verb = "is" if len(weak) == 1 else "are"
        text += f" {plural(len(weak), 'weak organism')} {verb} in no pool; see each model alone, and Admission."
    return element("p", text, class_="small")


def _weak(subject: Subject) -> Html | None:
    return tag("weak", "unknown") if subject.admitted is False else None


HEADLINE = Section(
    "headline", "What was found", _headline, "Rates: no request was judged, so nothing is known of what is found."
)
