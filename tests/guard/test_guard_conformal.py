"""The promise of thresholds that share a rate: in simulation, and rank by rank against a count by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.conformal import JointRanks, needed_requests
from guard.errors import CalibrationError

from .planted import Array

Columns = Mapping[str, list[float]]

VALUES = st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10), st.just(-math.inf))
"""Ties, numbers of all kinds, and scores that a request does not have."""


@st.composite
def columns(draw: st.DrawFn, least: int = 1) -> Columns:
    count = draw(st.integers(least, 30))
    names = "abcd"[: draw(st.integers(1, 4))]
    return {name: draw(st.lists(VALUES, min_size=count, max_size=count)) for name in names}


# -- the promise ------------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], Array]
"""Scores [columns, requests] of requests that are drawn alike."""


def correlated(weight: float, count: int = 4) -> Draw:
    def draw(source: np.random.Generator, requests: int) -> Array:
        shared = source.normal(size=requests)
        own = source.normal(size=(count, requests))
        return weight * shared + math.sqrt(1 - weight**2) * own

    return draw


def with_ties(source: np.random.Generator, requests: int) -> Array:
    return np.round(correlated(0.5)(source, requests))


def with_absences(source: np.random.Generator, requests: int) -> Array:
    """A third of the requests have no score in the second half of the columns: the usual ones, or the unusual."""
    found = correlated(0.3)(source, requests)
    found[2:, found[0] > 0.4] = -np.inf
    found[3, source.random(requests) < 0.3] = -np.inf
    return found


def of_two_kinds(source: np.random.Generator, requests: int) -> Array:
    """Each column is largest for requests of its own kind: no two scores are ever rare together."""
    kind = source.integers(0, 4, size=requests)
    return np.where(np.arange(4)[:, None] == kind, 5.0, 0.0) + source.normal(size=(4, requests))


def with_heavy_tails(source: np.random.Generator, requests: int) -> Array:
    scores: Array = source.standard_cauchy(size=(4, requests)) * np.array([[1.0], [1e-6], [1e6], [-1.0]])
    return scores


DRAWS: dict[str, Draw] = {
    "one score": correlated(0.0, 1),
    "independent": correlated(0.0),
    "correlated": correlated(0.8),
    "moving as one": correlated(1.0),
    "ties": with_ties,
    "absences": with_absences,
    "kinds": of_two_kinds,
    "heavy tails": with_heavy_tails,
}


@pytest.mark.parametrize(("fpr", "requests"), [(0.05, 99), (0.1, 60), (0.02, 300)])
@pytest.mark.parametrize("kind", DRAWS)
def test_a_new_clean_request_is_flagged_at_most_as_often_as_was_asked(kind: str, fpr: float, requests: int) -> None:
    """One new request per calibration, thousands of calibrations: flags are coin tosses with the promised chance."""
    trials, flagged, granted = 3000, 0, 0.0
    source = np.random.default_rng(requests)
    for _ in range(trials):
        drawn = DRAWS[kind](source, requests + 1)
        ranks = JointRanks(dict(enumerate(drawn[:, :-1])))
        thresholds = [ranks.threshold(key, fpr) for key in range(len(drawn))]
        flagged += bool((drawn[:, -1] > thresholds).any())
        granted += ranks.rank(fpr) / (requests + 1)
    error = math.sqrt(fpr * (1 - fpr) / trials)
    assert flagged / trials <= fpr + 3 * error
    # And the rate that was granted is used, as far as ranks and ties allow: thresholds of infinity would keep it too.
    # A request is flagged at rank r at least as often as one score of it alone is.
    if kind != "ties":
        assert flagged / trials >= granted / trials * 0.75 - 3 * error
        assert flagged / trials >= fpr - 2.5 / (requests + 1) - 3 * error


def test_a_rate_is_not_split_between_scores_that_move_together() -> None:
    drawn = DRAWS["moving as one"](np.random.default_rng(0), 999)
    together, alone = JointRanks(dict(enumerate(drawn))), JointRanks({0: drawn[0]})
    for fpr in (0.002, 0.01, 0.3):
        assert together.threshold(0, fpr) == alone.threshold(0, fpr)
    apart = JointRanks(dict(enumerate(DRAWS["kinds"](np.random.default_rng(0), 999))))
    assert apart.rank(0.01) <= 3 < alone.rank(0.01)


# -- ranks ------------------------------------------------------------------------------------------------------------


def entered_by_hand(scores: Columns, rank: int) -> int:
    """U(r): how many requests have some score among the r largest of all; one that ties with others needs room for
    all of them."""
    count = len(next(iter(scores.values())))
    return sum(
        any(
            column[request] > -math.inf and sum(other >= column[request] for other in column) <= rank
            for column in scores.values()
        )
        for request in range(count)
    )


def rank_by_hand(scores: Columns, fpr: Fraction) -> int:
    count = len(next(iter(scores.values())))
    kept = (rank for rank in range(1, count + 1) if entered_by_hand(scores, rank) + 1 <= fpr * (count + 1))
    return max(kept, default=0)


@settings(max_examples=200, deadline=None)
@given(columns(), st.data())
def test_the_rank_of_a_rate_is_the_largest_that_keeps_it(scores: Columns, data: st.DataObject) -> None:
    count = len(scores["a"])
    ranks = JointRanks(scores)
    # Rates where a rank begins, which rounding must not lose, and any others.
    fpr = data.draw(
        st.one_of(
            st.integers(1, count).map(lambda whole: Fraction(whole, count + 1)),
            st.fractions(0, 1, max_denominator=1000).filter(lambda rate: 0 < rate < 1),
        )
    )
    assert ranks.rank(float(fpr)) == rank_by_hand(scores, fpr)
    assert ranks.supported == pytest.approx(min(1.0, (entered_by_hand(scores, 1) + 1) / (count + 1)))


@pytest.mark.parametrize("percent", range(2, 100))
def test_a_rate_in_whole_percents_does_not_lose_its_rank_to_rounding(percent: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    ranks = JointRanks({"only": [float(score) for score in range(99)]})
    assert ranks.rank(float(f"0.{percent:02}")) == percent - 1
    assert ranks.p_value("only", 101.0 - percent) == percent / 100


@settings(max_examples=200, deadline=None)
@given(columns(), st.floats(1e-3, 1, exclude_max=True))
def test_a_threshold_is_the_score_at_the_rank_or_refused_with_the_numbers(scores: Columns, fpr: float) -> None:
    ranks, count = JointRanks(scores), len(scores["a"])
    rank = ranks.rank(fpr)
    for name, column in scores.items():
        if rank:
            assert ranks.threshold(name, fpr) == sorted(column, reverse=True)[rank - 1]
            continue
        assert fpr < ranks.supported
        with pytest.raises(CalibrationError, match=f"with {count} held-out clean requests, which support"):
            ranks.threshold(name, fpr)


def test_too_few_requests_are_refused_with_what_they_support_and_what_is_needed() -> None:
    ranks = JointRanks({"prompt": list(range(99)), "completion": list(range(99))[::-1]})
    assert ranks.threshold("prompt", 0.03) == 98
    with pytest.raises(CalibrationError) as caught:
        ranks.threshold("prompt", 0.01)
    assert str(caught.value) == (
        "a false-positive rate of 0.01 cannot be kept with 99 held-out clean requests, which support 0.03 or more; "
        "about 299 are needed"
    )


@given(columns(), st.lists(st.floats(1e-3, 1, exclude_max=True), min_size=2, max_size=8))
def test_a_larger_rate_never_has_a_higher_threshold(scores: Columns, rates: list[float]) -> None:
    ranks = JointRanks(scores)
    kept = [rate for rate in sorted(rates) if rate >= ranks.supported]
    for name in scores:
        thresholds = [ranks.threshold(name, rate) for rate in kept]
        assert thresholds == sorted(thresholds, reverse=True)


@settings(max_examples=200, deadline=None)
@given(columns(), st.data())
def test_a_request_is_flagged_at_a_rate_exactly_where_its_p_value_is_at_most_that_rate(
    scores: Columns, data: st.DataObject
) -> None:
    ranks, count = JointRanks(scores), len(scores["a"])
    # A new request, often with the very scores of old ones.
    new = {name: data.draw(st.one_of(st.sampled_from(column), VALUES)) for name, column in scores.items()}
    p_value = min(ranks.p_value(name, value) for name, value in new.items())
    rates = [Fraction(whole, count + 1) for whole in range(1, count + 1)]
    rates += [rate - Fraction(1, 10_000) for rate in rates] + [rate + Fraction(1, 10_000) for rate in rates]
    for rate in rates:
        if not 0 < rate < 1 or ranks.rank(float(rate)) == 0:
            continue
        flagged = any(value > ranks.threshold(name, float(rate)) for name, value in new.items())
        assert flagged == (p_value <= float(rate) + 1e-9)
    assert p_value >= ranks.supported


@given(columns())
def test_nan_has_the_smallest_p_value_that_the_data_can_express(scores: Columns) -> None:
    ranks = JointRanks(scores)
    for name in scores:
        assert ranks.p_value(name, math.nan) == ranks.p_value(name, math.inf) == ranks.supported


@given(columns(), VALUES, VALUES)
def test_a_larger_score_never_has_a_larger_p_value(scores: Columns, one: float, other: float) -> None:
    ranks = JointRanks(scores)
    for name in scores:
        assert ranks.p_value(name, max(one, other)) <= ranks.p_value(name, min(one, other))
        assert ranks.p_value(name, -math.inf) == 1.0


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60, unique=True), st.floats(1e-2, 0.99))
def test_one_score_is_split_conformal_prediction_one_rank_on_the_safe_side(scores: list[float], fpr: float) -> None:
    """Which flags above the k-th largest of n, k = floor(a (n + 1)). The place of the new request among others' scores
    is not known where there are several; the rank that this costs is given up for one score, too."""
    ranks = JointRanks({"only": scores})
    classic = math.floor(fpr * (len(scores) + 1) + 1e-9)
    assert ranks.rank(fpr) == max(0, classic - 1)
    for value in scores:
        above = sum(other >= value for other in scores)
        assert ranks.p_value("only", value) == pytest.approx(min(1.0, (above + 2) / (len(scores) + 1)))


# -- how many are needed ----------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 1, exclude_max=True), st.integers(1, 6))
def test_needed_requests_keep_the_rate_whatever_the_scores_and_one_fewer_do_not(fpr: float, scores: int) -> None:
    needed = needed_requests(fpr, scores)
    # At worst every score is largest for another request.
    assert (scores + 1) / (needed + 1) <= fpr * (1 + 1e-6)
    assert (scores + 1) / needed > fpr * (1 - 1e-6)


@pytest.mark.parametrize("scores", [1, 2, 4])
@pytest.mark.parametrize("fpr", [0.1, 0.25])
def test_requests_that_are_largest_in_one_score_each_need_as_many_as_is_said(scores: int, fpr: float) -> None:
    needed = needed_requests(fpr, scores)
    for count, supported in ((needed, True), (needed - 1, False)):
        # Each column's largest is another request.
        rolled = {name: np.roll(np.arange(count, dtype=float), 2 * name).tolist() for name in range(scores)}
        ranks = JointRanks(rolled)
        assert (ranks.rank(fpr) >= 1) == supported
        assert ranks.needed(fpr) == needed


def test_no_requests_support_no_rate() -> None:
    ranks: JointRanks[str] = JointRanks({"a": [], "b": []})
    assert ranks.supported == 1.0
    assert ranks.p_value("a", 3.0) == ranks.p_value("a", math.nan) == 1.0
    with pytest.raises(CalibrationError, match="with 0 held-out clean requests"):
        ranks.threshold("a", 0.99)


def test_requests_without_any_score_are_flagged_by_none_and_count_as_clean() -> None:
    ranks = JointRanks({"a": [-math.inf] * 9, "b": [-math.inf] * 9})
    assert ranks.supported == 0.1
    assert ranks.rank(0.1) == 9
    # What no clean request had is rare, whatever it is.
    assert ranks.p_value("a", -5.0) == 0.1
    assert ranks.threshold("a", 0.1) == -math.inf


@pytest.mark.parametrize("scores", [{}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [], "b": [1.0]}])
def test_scores_of_other_requests_cannot_be_ranked_together(scores: dict[str, list[float]]) -> None:
    with pytest.raises(CalibrationError, match="expected the same requests for all"):
        JointRanks(scores)
