"""Tables: a share with its counts, its interval and a small picture of both in each cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from guard.evaluation.report.markup import Child, Html, element
from guard.evaluation.report.names import KINDS
from guard.evaluation.report.numbers import NOT_MEASURED, percent, span, whole
from guard.evaluation.report.plots import mini
from guard.evaluation.report.view import Pool
from guard.evaluation.results import Counted


@dataclass(frozen=True)
class Column:
    """How shares are shown: whether a high one is hoped for; an axis up to `most`; a mark where they should lie."""

    wanted: bool
    most: float = 1.0
    mark: float | None = None


FOUND_COLUMN = Column(wanted=True)


def column(pools: Iterable[Pool | None], target: float, *, wanted: bool) -> Column:
    """An axis that suits the pools: all of 0 to 1, or, where every share is small, four times the target at least."""
    highest = max((pool.interval[1] for pool in pools if pool is not None), default=0.0)
    if wanted or highest > 0.25:
        return Column(wanted)
    return Column(wanted, most=min(1.0, max(4 * target, highest)), mark=target)


def share_cell(pool: Pool | None, shown: Column, span_columns: int | None = None) -> Html:
    """A cell of a pool, tinted by how far it is from nothing."""
    if pool is None:
        return element("td", NOT_MEASURED, class_="rate none", colspan=span_columns)
    low, high = pool.interval
    style = "found" if shown.wanted else "false"
    # Small false-positive rates are told apart by a root, large ones by the text.
    tint = 0.30 * pool.share if shown.wanted else 0.38 * (pool.share**0.5 if pool.share > 0.01 else pool.share * 10)
    children: list[Child] = [
        _share(pool.share, low, high),
        mini(pool.share, low, high, shown.most, style, shown.mark),
        element("span", f"{whole(pool.hits)}/{whole(pool.count)}", class_="n"),
    ]
    if pool.over_subjects is not None:
        children.append(element("span", "models ", span(*pool.over_subjects), class_="n"))
    return element("td", *children, class_=f"rate {style}", style=f"--a:{tint:.3f}", colspan=span_columns)


def table(
    caption: str,
    head: Sequence[Html],
    rows: Iterable[Sequence[Child]],
    *,
    style: str | None = None,
    hidden: bool = False,
) -> Html:
    """A table that scrolls sideways by itself on a narrow screen. `head`: rows of the head, as markup.

    A row's first text becomes its heading; what is markup already stands as it is.
    """
    body = [element("tr", *map(_cell, row, range(len(row)))) for row in rows]
    told = element("caption", caption, class_="unseen" if hidden else None)
    inside = element("table", told, element("thead", *head), element("tbody", *body), class_=style)
    return element("div", inside, class_="wide", tabindex=0, role="region", aria_label=caption)


def heads(*names: Child) -> Html:
    """One row of column headings; what is markup already stands as it is."""
    return element("tr", *(name if isinstance(name, Html) else element("th", name, scope="col") for name in names))


def kind_head(kind: str, **attributes: str | int | None) -> Html:
    """A heading that says what the kind of prompt is, to those who ask."""
    told = KINDS.get(kind)
    text = element("abbr", kind, title=told) if told else kind
    return element("th", text, scope="col", **attributes)


def more(summary: str, *children: Child, open_: bool = False) -> Html:
    """What is there for those who want it."""
    return element("details", element("summary", summary), *children, open=open_)


def tag(text: str, style: str) -> Html:
    return element("span", text, class_=f"tag {style}")


def _share(share: float, low: float, high: float) -> Html:
    return element(
        "span", element("b", percent(share)), " ", element("span", span(low, high), class_="ci"), class_="top"
    )


def _cell(child: Child, index: int) -> Child:
    if isinstance(child, Html) and child.startswith(("<td", "<th")):
        return child
    return element("td", child) if index else element("th", child, scope="row")


def counted_cell(counted: Counted | None, *notes: Child) -> Html:
    """A cell of one count, with its interval and whatever else belongs to it."""
    if counted is None or not counted.counted()[1]:
        return element("td", NOT_MEASURED, class_="rate none")
    hits, count = counted.counted()
    return element(
        "td",
        _share(counted.share, counted.low, counted.high),
        element("span", f"{whole(hits)}/{whole(count)}", class_="n"),
        *notes,
        class_="rate",
    )


def number_head(text: str) -> Html:
    return element("th", text, scope="col", class_="number")


def number_cell(text: str) -> Html:
    return element("td", text, class_="number")
