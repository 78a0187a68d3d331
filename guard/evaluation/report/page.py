"""The whole page: navigation, sections in order, what was not measured, and how it was done."""

from __future__ import annotations

from guard.evaluation.report.adaptive import ADAPTIVE
from guard.evaluation.report.amounts import CALIBRATION, DIRECTIONS
from guard.evaluation.report.comparisons import ADMISSION, BASELINES, CONTROLS, SHIFTS, UNLEARNED
from guard.evaluation.report.headline import HEADLINE
from guard.evaluation.report.latency import LATENCY
from guard.evaluation.report.layers import LAYERS
from guard.evaluation.report.lengths import LENGTH
from guard.evaluation.report.markup import Child, Html, element, join
from guard.evaluation.report.names import DELTAS, DETECTORS, KINDS, ordered
from guard.evaluation.report.numbers import NOT_MEASURED, plural, rate, whole
from guard.evaluation.report.promise import PROMISE
from guard.evaluation.report.roc import ROC
from guard.evaluation.report.section import Section
from guard.evaluation.report.style import STYLE
from guard.evaluation.report.tables import heads, table
from guard.evaluation.report.view import View
from guard.evaluation.results import Results

# Nothing is loaded from anywhere: the file says so itself, and the browser holds it to that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(results: Results) -> str:
    """One HTML file that stands alone: no network, no script, light and dark, fit for paper."""
    view = View(results)
    present: list[tuple[str, str, Html]] = []
    missing: list[str] = []
    for section in SECTIONS:
        body = section.body(view)
        if body is None:
            missing.append(section.missing)
        else:
            present.append((section.anchor, section.title, body))
    if missing:
        lines = element("ul", *(element("li", line) for line in missing), class_="missing")
        present.insert(-1, ("not-measured", "Not measured", lines))
    links = [element("li", element("a", title, href=f"#{anchor}")) for anchor, title, _ in present]
    nav = element("nav", element("p", "Undertow", class_="brand"), element("ol", *links), aria_label="Sections")
    main = element("main", _header(view), *(_section(*told) for told in present), id="content")
    skip = element("a", "To the content", href="#content", class_="skip")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", results.run.title),
        element("style", Html(STYLE)),
    )
    page = element("html", head, element("body", skip, element("div", nav, main, class_="page")), lang="en")
    return f"<!doctype html>\n{page}\n"


def _section(anchor: str, title: str, body: Html) -> Html:
    return element(
        "section", element("h2", title, id=f"{anchor}-title"), body, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def _header(view: View) -> Html:
    run = view.run
    subjects = plural(len(view.results.subjects), "model")
    line = f"{run.created.replace('T', ' ')} · {subjects} · Undertow {run.versions.undertow}"
    return element("header", element("h1", run.title), element("p", line, class_="byline"))


def _method(view: View) -> Html:
    run = view.run
    facts = {
        "created": run.created,
        "rates asked for": ", ".join(map(rate, run.targets)),
        "seeds": ", ".join(map(str, run.seeds)),
        "prompts per model": _amounts(run.prompts),
        "calibration": _amounts(run.calibration),
        "versions": f"undertow {run.versions.undertow}, torch {run.versions.torch}, transformers "
        f"{run.versions.transformers}, Python {run.versions.python}",
    }
    rows: list[Child] = [
        element("dt", name) if part == 0 else element("dd", text or NOT_MEASURED)
        for name, text in facts.items()
        for part in (0, 1)
    ]
    kinds = ordered([*view.kinds, *run.prompts], KINDS)
    detectors = ordered((told.detector for told in view.results.rates), DETECTORS)
    return join(
        element("dl", *rows),
        element("h3", "Again"),
        element("pre", element("code", run.command)),
        element("h3", "Intervals"),
        element(
            "p",
            "Over prompts: Clopper and Pearson, 95%, on the counts as they are pooled. Prompts of one model are not "
            "independent draws of models, so where three models or more are pooled, a bootstrap draws the models "
            "again (2,000 draws, 95%). Models that all agree give an interval without width; that says nothing of "
            "the next model. A model that was not admitted is in no pool.",
        ),
        _glossary("Deltas", [(name, DELTAS[name]) for name in ("wide", "narrow")]),
        _glossary("Detectors", [(name, DETECTORS.get(name, NOT_MEASURED)) for name in detectors]),
        _glossary("Kinds of request", [(name, KINDS.get(name, NOT_MEASURED)) for name in kinds]),
    )


def _amounts(amounts: dict[str, int]) -> str:
    return ", ".join(f"{name} {whole(count)}" for name, count in amounts.items())


def _glossary(title: str, entries: list[tuple[str, str]]) -> Html | None:
    if not entries:
        return None
    return join(
        element("h3", title), table(title, [heads("name", "what it is")], entries, style="methods", hidden=True)
    )


METHOD = Section("method", "Method", _method, "")

SECTIONS = (
    HEADLINE,
    BASELINES,
    PROMISE,
    SHIFTS,
    ROC,
    LAYERS,
    LENGTH,
    LATENCY,
    CALIBRATION,
    DIRECTIONS,
    ADAPTIVE,
    UNLEARNED,
    CONTROLS,
    ADMISSION,
    METHOD,
)
