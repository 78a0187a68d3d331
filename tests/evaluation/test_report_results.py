"""Results as values and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from guard.evaluation.results import (
    Count,
    DirectionShare,
    Latency,
    Layers,
    Rate,
    Results,
    ResultsError,
    Roc,
    bootstrap_interval,
    interval,
)
from guard.intervals import clopper_pearson
from tests.evaluation.synthetic import full_results, minimal_results


def test_json_gives_the_same_results_back() -> None:
    results = full_results(families=2)
    again = Results.from_json(results.to_json())
    # NaN is not equal to itself; in JSON it is null.
    assert again.to_json() == results.to_json()
    assert again.rates == results.rates
    assert again.subjects == results.subjects


def test_a_missing_number_is_null_in_json_and_nan_here() -> None:
    layers = Layers(subject="my-model", delta="wide", kind="triggered", layers=(0, 1), share=(0.5, math.nan))
    text = replace(minimal_results(), layers=(layers,)).to_json()
    assert json.loads(text)["layers"][0]["share"] == [0.5, None]
    assert math.isnan(Results.from_json(text).layers[0].share[1])


def test_json_has_one_row_per_line_with_its_interval() -> None:
    (line,) = [line for line in minimal_results().to_json().splitlines() if '"flagged"' in line]
    row = json.loads(line.rstrip(","))
    low, high = clopper_pearson(4, 500)
    assert (row["share"], row["low"], row["high"]) == (0.008, round(low, 6), round(high, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"flagged": 4', '"flaged": 4'), "rates.0.flaged: unknown key"),
        (('"flagged": 4', '"flagged": "4"'), "rates.0.flagged: Input should be a valid integer"),
        (('"flagged": 4', '"flagged": 501'), "rates.0: 501 of 500 is more than all"),
        (('"flagged": 4, ', ""), "rates.0.flagged: Field required"),
        (('"delta": "wide"', '"delta": "broad"'), "rates.0.delta: Input should be 'wide', 'narrow' or 'none'"),
        (('"subject": "my-model"', '"subject": "another"'), "rates.0.subject: 'another' is not among the subjects"),
        (('"version": 1', '"version": 2'), "version: Input should be 1"),
        (('"target": 0.01', '"target": 1.01'), "rates.0.target: Input should be less than or equal to 1"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(change: tuple[str, str], message: str) -> None:
    text = minimal_results().to_json()
    assert text.count(change[0]) == 1
    with pytest.raises(ResultsError) as caught:
        Results.from_json(text.replace(*change))
    assert str(caught.value) == f"results: {message}"


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ResultsError, match="Invalid JSON"):
        Results.from_json("{")


def test_a_subject_has_one_name() -> None:
    results = minimal_results()
    with pytest.raises(ValidationError, match="'my-model' is named more than once"):
        replace(results, subjects=results.subjects * 2)


def test_columns_have_one_length() -> None:
    with pytest.raises(ValidationError, match="2 fpr, 1 tpr"):
        Roc(subject="a", delta="wide", detector="density", phase="both", fpr=(0.0, 1.0), tpr=(1.0,))


def test_every_request_of_a_latency_is_found_or_not() -> None:
    with pytest.raises(ValidationError, match="2 tokens and 1 undetected are not 4"):
        Latency(subject="a", delta="wide", detector="policy", tokens=(0, 1), undetected=1, count=4)


def test_values_are_checked_when_they_are_made() -> None:
    with pytest.raises(ValidationError, match="5 of 3 is more than all"):
        Count(hits=5, count=3)
    with pytest.raises(ValidationError, match="direction"):
        DirectionShare(direction=3, share=0.1)  # type: ignore[arg-type]


def test_a_rate_knows_its_share_and_interval() -> None:
    rate = Rate(
        subject="a", delta="wide", detector="policy", phase="both", kind="clean", target=None, flagged=1, count=100
    )
    assert rate.share == 0.01
    assert (rate.low, rate.high) == pytest.approx(clopper_pearson(1, 100))


@pytest.mark.parametrize(("hits", "count"), [(0, 300), (1, 300), (299, 300), (300, 300), (37, 90), (1, 1)])
def test_the_interval_is_that_of_clopper_and_pearson(hits: int, count: int) -> None:
    assert interval(hits, count) == pytest.approx(clopper_pearson(hits, count))


def test_nothing_counted_says_nothing() -> None:
    assert interval(0, 0) == (0.0, 1.0)
    assert math.isnan(Count(hits=0, count=0).share)


def test_the_bootstrap_draws_subjects_not_prompts() -> None:
    apart = bootstrap_interval([(0, 300), (150, 300), (300, 300)])
    assert apart == (0.0, 1.0)
    assert bootstrap_interval([(150, 300)] * 5) == (0.5, 0.5)
    assert bootstrap_interval([(1, 2), (2, 3), (0, 4)], seed=3) == bootstrap_interval([(1, 2), (2, 3), (0, 4)], seed=3)


def test_two_subjects_have_no_bootstrap() -> None:
    assert bootstrap_interval([(1, 2), (2, 2), (0, 0)]) is None
