"""A verdict is its definition, and NaN never passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .planted import a_verdict


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
