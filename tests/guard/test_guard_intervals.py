"""Exact binomial intervals against published values, brute force and simulation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.intervals import beta_interval, binomial_tail, clopper_pearson

from .planted import generator


def exact_tail(least: int, count: int, rate: float) -> float:
    return math.fsum(
        math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits) for hits in range(least, count + 1)
    )


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 300, 0.0, 0.012221),
        (100, 100, 0.963783, 1.0),
        (5, 500, 0.003256, 0.023179),
        (1, 10, 0.002529, 0.445016),
        (10, 100, 0.049005, 0.176223),
    ],
)
def test_clopper_pearson_gives_the_published_values(hits: int, count: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, count) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_clopper_pearson_inverts_the_binomial_distribution(count: int, confidence: float) -> None:
    tail = (1 - confidence) / 2
    for hits in range(count + 1):
        low, high = clopper_pearson(hits, count, confidence)
        if hits > 0:
            assert exact_tail(hits, count, low) == pytest.approx(tail, abs=1e-9)
        if hits < count:
            assert 1 - exact_tail(hits + 1, count, high) == pytest.approx(tail, abs=1e-9)


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_the_rate_that_was_counted_lies_in_its_interval(count: int, hits: int, confidence: float) -> None:
    hits = min(hits, count)
    low, high = clopper_pearson(hits, count, confidence)
    assert 0 <= low <= hits / count <= high <= 1
    mirrored = clopper_pearson(count - hits, count, confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("hits", "count"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(hits: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{hits} of {count}"):
        clopper_pearson(hits, count)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.03, 0.5, 1.0])
def test_a_binomial_tail_is_its_sum(rate: float) -> None:
    for least in (0, 1, 3, 40):
        assert binomial_tail(least, 40, rate) == pytest.approx(exact_tail(least, 40, rate), abs=1e-12)


@pytest.mark.parametrize(("rank", "count"), [(1, 99), (5, 999), (30, 300)])
def test_a_beta_interval_holds_the_true_rate_as_often_as_it_says(rank: int, count: int) -> None:
    draws = 4000
    # The rank-th largest of uniform clean scores: the rate above it is one minus it.
    uniform = torch.rand(draws, count, generator=generator(rank))
    rates = 1 - uniform.topk(rank, dim=1).values[:, -1]
    low, high = beta_interval(rank, count)
    below, above = float((rates < low).double().mean()), float((rates > high).double().mean())
    error = 4 * math.sqrt(0.025 * 0.975 / draws)
    assert below == pytest.approx(0.025, abs=error)
    assert above == pytest.approx(0.025, abs=error)
