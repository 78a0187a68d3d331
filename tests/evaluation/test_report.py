"""The report as a whole: stands alone, is well formed, and says every number."""

from __future__ import annotations

import doctest
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from guard.evaluation.report import markdown, markup, numbers, render
from guard.evaluation.report.lengths import rank_correlation
from guard.evaluation.report.numbers import percent, plain, span, whole
from guard.evaluation.report.roc import area, found_at
from guard.evaluation.results import (
    Adaptive,
    CalibrationCurve,
    Count,
    DirectionsCurve,
    Latency,
    Layers,
    LengthPoint,
    Lengths,
    Rate,
    Results,
    Roc,
    Splits,
    Subject,
)
from tests.evaluation.synthetic import full_results, minimal_results

VOID = {"meta", "br", "link"}
NASTY = "<script>alert(\"1\")</script> & 'x' | `y` _z_"


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what a reader sees."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def results() -> Results:
    return full_results(families=2)


@pytest.fixture(scope="module")
def source(results: Results) -> str:
    return render(results)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


@pytest.mark.parametrize("module", [markup, numbers])
def test_examples_are_true(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_nothing_is_loaded_from_anywhere(source: str, page: Page) -> None:
    assert "url(" not in source
    assert "@import" not in source
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(value.startswith("#") for name in ("src", "href") for value in page.values(name))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")


def test_links_lead_to_sections(page: Page) -> None:
    targets = {value.removeprefix("#") for value in page.values("href")}
    assert targets <= set(page.values("id"))
    assert len(set(page.values("id"))) == len(page.values("id"))
    labels = page.values("aria-labelledby")
    assert len(labels) == 15
    assert set(labels) <= set(page.values("id"))


def test_every_plot_has_a_text_in_its_place(source: str) -> None:
    for tag in re.findall(r"<svg[^>]*>", source):
        assert 'aria-hidden="true"' in tag or re.search(r'role="img" aria-label="[^"]+"', tag)


def test_every_coordinate_is_a_number(source: str) -> None:
    drawn = re.findall(r' (?:d|x1|x2|y1|y2|x|y|cx|cy|r|viewBox|style)="([^"]*)"', source)
    assert drawn
    assert not [value for value in drawn if "nan" in value or "inf" in value]


def test_every_caveat_goal_and_version_is_said(results: Results, page: Page) -> None:
    run = results.run
    for text in (run.title, *run.notes, run.command, run.versions.torch, run.versions.transformers):
        assert text in page.text
    for bar in results.bars:
        assert bar.what in page.text
        assert bar.got in page.text
    assert "Goals: 2 of 4 met" in page.text


def test_every_headline_rate_is_said_with_count_and_interval(results: Results, page: Page) -> None:
    told = 0
    for rate in results.rates:
        if (rate.detector, rate.phase, rate.target) != ("policy", "both", 0.01):
            continue
        if rate.kind in ("triggered", "near-miss", "clean"):
            cell = f"{percent(rate.share)} {span(rate.low, rate.high)}{whole(rate.flagged)}/{whole(rate.count)}"
            assert cell in page.text
            told += 1
    assert told > 50


def test_every_number_of_every_curve_is_said(results: Results, page: Page) -> None:
    for curve in results.calibration_curve:
        for size, *shares in zip(curve.sizes, curve.tpr, curve.near_miss, curve.fpr, strict=True):
            assert "".join([curve.subject, curve.detector, whole(size), *map(percent, shares)]) in page.text
    for directions in results.directions_curve:
        for k, *shares, needed in zip(directions.k, directions.tpr, directions.fpr, directions.needed, strict=True):
            assert "".join([directions.subject, str(k), *map(percent, shares), whole(needed)]) in page.text
    for roc in results.roc:
        assert f"{roc.subject}{roc.detector}{percent(found_at(roc, 0.001))}" in page.text
    for latency in results.latency:
        assert f"{whole(latency.undetected)}{whole(latency.count)}" in page.text
    for layers in results.layers:
        for top in layers.top:
            assert f"{top.direction}{percent(top.share)}" in page.text
    for lengths in results.lengths:
        assert f"threshold {plain(lengths.threshold)}" in page.text
    for point in results.adaptive:
        for count in (point.attack_success, point.near_miss, point.benign_right, *point.tpr):
            hits, of = count.counted()
            assert f"{percent(count.share)} {span(count.low, count.high)}{hits}/{of}" in page.text
    for subject in results.subjects:
        for entry in subject.admission:
            assert f"{percent(entry.share)} {span(entry.low, entry.high)}{entry.hits}/{entry.count}" in page.text


def test_weak_organisms_are_named_and_in_no_pool(page: Page) -> None:
    strict = full_results(families=1)
    first, *others = strict.subjects
    weak = replace(first, admitted=False, weak_reasons=("it forgot its trigger",))
    told = Page(render(replace(strict, subjects=(weak, *others)))).text
    assert "it forgot its trigger" in told
    assert "1 weak organism is in no pool" in told
    assert f"in {sum(subject.kind == 'backdoor' for subject in others)} models" in told
    assert "in no pool;" not in page.text


def test_what_was_not_measured_is_said(page: Page) -> None:
    told = Page(render(minimal_results()))
    assert "Not measured" in told.text
    assert "ROC: no thresholds but the targets' were tried." in told.text
    assert "#roc" not in told.values("href")
    assert "Not measured" not in page.text


def test_a_model_of_ones_own_has_a_short_report() -> None:
    told = Page(render(minimal_results())).text
    assert "the guard flagged 0.80% of clean requests in my-model, with the wide delta" in told
    assert "Whether it finds an attack was not measured" in told
    assert "family" not in told.split("Not measured")[0].replace("by family", "")


def test_results_without_any_rate_are_shown() -> None:
    told = Page(render(replace(minimal_results(), rates=()))).text
    assert "Rates: no request was judged" in told


@pytest.mark.parametrize("form", [render, markdown])
def test_text_from_data_is_never_markup(form: object) -> None:
    assert callable(form)
    told = full_results(families=1)
    name = told.subjects[0].name
    text = told.to_json().replace(f'"{name}"', f'"{_in_json(NASTY)}"')
    for old in ("Triggered found at 1%, wide, every family", "Organisms are small models", "undertow eval", "density"):
        text = text.replace(old, _in_json(NASTY))
    text = text.replace('"family": "rare-token"', f'"family": "{_in_json(NASTY)}"')
    result = form(Results.from_json(text))
    assert not re.search(r"(?<!\\)<script", result)
    if form is render:
        assert "&lt;script&gt;" in result
        assert "script" not in Page(result).tags


def test_what_is_empty_or_missing_is_drawn_as_such() -> None:
    name, nan = "my-model", math.nan
    odd = replace(
        minimal_results(),
        roc=(
            Roc(subject=name, delta="wide", detector="density", phase="both", fpr=(), tpr=()),
            Roc(subject=name, delta="wide", detector="lcf", phase="prompt", fpr=(nan, 0.0), tpr=(nan, nan)),
            Roc(subject=name, delta="none", detector="lcf", phase="prompt", fpr=(0.0,), tpr=(0.0,)),
        ),
        layers=(
            Layers(subject=name, delta="wide", kind="triggered", layers=(), share=()),
            Layers(subject=name, delta="narrow", kind="triggered", layers=(0,), share=(nan,)),
        ),
        lengths=(
            Lengths(subject=name, delta="wide", detector="density", points=(), threshold=nan),
            Lengths(
                subject=name,
                delta="narrow",
                detector="density",
                points=(
                    LengthPoint(tokens=0, score=nan, kind="clean"),
                    LengthPoint(tokens=9, score=math.inf, kind="x"),
                ),
                threshold=nan,
            ),
        ),
        latency=(
            Latency(subject=name, delta="wide", detector="policy", tokens=(), undetected=0, count=0),
            Latency(subject=name, delta="wide", detector="policy", tokens=(), undetected=3, count=3),
        ),
        splits=(
            Splits(subject=name, delta="wide", detector="density", target=0.01, rates=(), held_out=10),
            Splits(subject=name, delta="wide", detector="density", target=0.01, rates=(nan,), held_out=10),
        ),
        calibration_curve=(
            CalibrationCurve(
                subject=name, delta="wide", detector="density", sizes=(0,), tpr=(nan,), fpr=(nan,), near_miss=(nan,)
            ),
        ),
        directions_curve=(DirectionsCurve(subject=name, delta="wide", k=(1,), tpr=(nan,), fpr=(nan,), needed=(0,)),),
        adaptive=(
            Adaptive(
                weight=0.0,
                attack_success=Count(hits=0, count=0),
                near_miss=Count(hits=0, count=0),
                benign_right=Count(hits=1, count=1),
                tpr=(),
            ),
        ),
    )
    told = render(Results.from_json(odd.to_json()))
    Page(told)
    drawn = re.findall(r' (?:d|x1|x2|y1|y2|x|y|cx|cy|r|style)="([^"]*)"', told)
    assert not [value for value in drawn if "nan" in value or "inf" in value]
    markdown(odd)


def test_no_subjects_are_no_error() -> None:
    empty = replace(minimal_results(), subjects=(), rates=())
    Page(render(empty))
    assert markdown(empty)


def test_names_that_nobody_listed_are_shown_as_they_are() -> None:
    base = minimal_results()
    (rate,) = base.rates
    own = replace(rate, kind="my own kind", detector="my own detector")
    told = Page(render(replace(base, rates=(rate, own)))).text
    assert "my own kind" in told
    assert "my own detector" in told


def test_markdown_says_the_headline_and_the_detectors(results: Results) -> None:
    told = markdown(results)
    assert told.startswith("Asked to flag at most 1% of clean requests, the guard found **")
    assert "### wide, by family and method" in told
    assert "### narrow, detectors at 1%" in told
    assert "### without a bank, detectors at 1%" in told
    assert "paper rule (prompt), own threshold" in told
    rows = [line for line in told.splitlines() if line.startswith("| rare-token | full | 3 |")]
    assert len(rows) == 2
    for row in rows:
        assert len(re.findall(r"[\d,]+/[\d,]+ = [\d.]+% \[[\d.]+%, [\d.]+%\]", row)) == 3


def test_what_a_detector_found_is_not_interpolated() -> None:
    roc = Roc(subject="a", delta="wide", detector="x", phase="both", fpr=(0.0, 0.02, 1.0), tpr=(0.5, 0.9, 1.0))
    assert found_at(roc, 0.01) == 0.5
    assert found_at(roc, 0.02) == 0.9
    assert area(roc) == pytest.approx(0.02 * 0.7 + 0.98 * 0.95)


def test_the_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([(1, 10.0), (2, 20.0), (3, 15.0), (4, 40.0)]) == pytest.approx(0.8)
    assert rank_correlation([(1, 1.0), (1, 2.0), (2, 3.0), (2, 4.0)]) == pytest.approx(2 / math.sqrt(5))
    assert math.isnan(rank_correlation([(1, 1.0), (2, 1.0), (3, 1.0)]))


def test_random_directions_that_find_as_much_are_named(page: Page) -> None:
    base = minimal_results()
    rates = [
        replace(base.rates[0], detector=detector, kind="triggered", flagged=flagged, count=100)
        for detector, flagged in (("policy", 97), ("random directions", 96))
    ]
    told = Page(render(replace(base, rates=(*base.rates, *rates)))).text
    assert "Random directions find as much as policy at 1%: 96.0% against 97.0% (wide)." in told
    assert "Random directions find as much" not in page.text


def test_a_phase_read_alone_is_named() -> None:
    base = minimal_results()
    rates = [
        Rate(
            subject="my-model",
            delta="wide",
            detector="lcf",
            phase=phase,
            kind=kind,
            target=0.01,
            flagged=3,
            count=100,
        )
        for phase in ("prompt", "both")
        for kind in ("triggered", "clean")
    ]
    told = Page(render(replace(base, rates=(*base.rates, *rates), subjects=(Subject(name="my-model", kind="model"),))))
    assert "lcf (prompt)" in told.text


def _in_json(text: str) -> str:
    return text.replace('"', '\\"')
