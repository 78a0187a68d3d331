"""A verdict is its definition, and NaN never passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.verdict import judge, p_value

from .planted import a_score, a_verdict

VALUES = st.one_of(st.floats(allow_nan=False), st.integers(-3, 3).map(float))


@given(VALUES, st.lists(VALUES))
def test_a_p_value_is_the_share_of_clean_requests_at_least_as_high(value: float, clean: list[float]) -> None:
    above = sum(score >= value for score in clean)
    assert p_value(value, sorted(clean)) == (1 + above) / (len(clean) + 1)


@given(st.lists(VALUES))
def test_nan_has_the_smallest_p_value_that_the_data_can_express(clean: list[float]) -> None:
    assert p_value(math.nan, sorted(clean)) == 1 / (len(clean) + 1)
    assert all(p_value(math.nan, sorted(clean)) <= p_value(value, sorted(clean)) for value in clean)


def test_a_score_at_the_threshold_is_not_above_it() -> None:
    assert not a_verdict(1.0).exceeded
    assert a_verdict(math.nextafter(1.0, 2)).exceeded


@given(st.floats(allow_nan=False))
def test_nan_exceeds_every_threshold(threshold: float) -> None:
    verdict = a_verdict(math.nan, threshold)
    assert verdict.exceeded
    assert verdict.ratio == math.inf


@given(st.floats(allow_nan=False))
def test_no_score_passes_a_threshold_that_is_nan(value: float) -> None:
    assert a_verdict(value, math.nan).exceeded


@pytest.mark.parametrize(
    ("value", "threshold", "ratio"),
    [
        (2.0, 2.0, 1.0),
        (3.0, 2.0, 1.5),
        (-3.0, 2.0, 0.0),
        (-math.inf, 2.0, 0.0),
        (math.inf, 2.0, math.inf),
        (1.0, 0.0, math.inf),
        (0.0, 0.0, 0.0),
        (-0.5, -1.0, math.inf),
        (-2.0, -1.0, 0.0),
        (0.0, -math.inf, math.inf),
        (-math.inf, -math.inf, 0.0),
    ],
)
def test_a_ratio_is_one_at_the_threshold_and_infinite_above_one_that_is_not_positive(
    value: float, threshold: float, ratio: float
) -> None:
    assert a_verdict(value, threshold).ratio == ratio


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(1e-3, 1e3))
def test_a_ratio_above_one_says_the_same_as_exceeded(value: float, threshold: float) -> None:
    verdict = a_verdict(value, threshold)
    if verdict.ratio > 1:
        assert verdict.exceeded
    if verdict.exceeded:
        assert verdict.ratio >= 1


def test_a_judgement_holds_the_score_its_threshold_and_its_p_value() -> None:
    verdict = judge(a_score(2.5), 2.0, [0.5, 1.0, 3.0])
    assert (verdict.score, verdict.threshold, verdict.p_value) == (a_score(2.5), 2.0, 0.5)
    assert verdict.exceeded
