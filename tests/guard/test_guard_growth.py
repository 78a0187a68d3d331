"""What a long request's scores may grow by, and what that does to the false-positive rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.conformal import JointRanks
from guard.growth import Growth


@given(st.integers(1, 500), st.floats(0, 10), st.integers(0, 2000))
def test_an_allowance_is_nothing_within_calibrations_length_and_logarithmic_beyond(
    tokens: int, scale: float, place: int
) -> None:
    found = float(Growth(tokens, scale).allowance(torch.tensor([place])))
    number = place + 1
    if number <= tokens:
        assert found == 0
    else:
        assert found == pytest.approx(2 * scale * math.log(number / tokens), rel=1e-4, abs=1e-6)


def test_allowances_are_given_for_many_places_and_never_fall() -> None:
    found = Growth(16, 0.5).allowance(torch.arange(5000))
    assert found.dtype == torch.float32
    assert found.shape == (5000,)
    assert (found[:16] == 0).all()
    assert (found.diff()[15:] > 0).all()
    assert len(Growth(16, 0.5).allowance(torch.arange(0))) == 0


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_the_scale_of_an_exponential_tail_is_found(scale: float) -> None:
    scores = 7 + np.random.default_rng(0).exponential(scale, size=4000)
    found = Growth.fit([*scores, *[-math.inf] * 900], 64)
    assert found.tokens == 64
    assert found.scale == pytest.approx(scale, rel=0.1)


@pytest.mark.parametrize("scores", [[], [3.0], [-math.inf, -math.inf, 2.0], [5.0] * 300])
def test_scores_that_tell_nothing_allow_nothing(scores: list[float]) -> None:
    assert Growth.fit(scores, 0) == Growth(1, 0.0)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(-math.inf))), st.integers(0, 100))
def test_a_fit_is_never_negative_or_undefined(scores: list[float], tokens: int) -> None:
    found = Growth.fit(scores, tokens)
    assert 0 <= found.scale < math.inf
    assert found.tokens == max(1, tokens)


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("longer", [3, 10])
def test_requests_many_times_longer_than_calibration_keep_the_rate_within_twice_the_target(
    longer: int, scale: float
) -> None:
    """A score is the largest over a request's tokens; with exponential tails the largest of more tokens is larger."""
    source = np.random.default_rng(longer)
    fpr, tokens, held_out, fresh, draws = 0.02, 20, 499, 400, 60
    flagged, unallowed, short = 0, 0, 0
    for _ in range(draws):
        clean = source.exponential(scale, size=(held_out, tokens)).max(axis=1)
        threshold = JointRanks({"only": clean.tolist()}).threshold("only", fpr)
        growth = Growth.fit(clean.tolist(), tokens)
        long = source.exponential(scale, size=(fresh, longer * tokens))
        short += int((long[:, :tokens].max(axis=1) > threshold).sum())
        unallowed += int((long.max(axis=1) > threshold).sum())
        allowance = growth.allowance(torch.arange(longer * tokens)).numpy()
        flagged += int(((long - allowance).max(axis=1) > threshold).sum())
    total = draws * fresh
    assert short / total == pytest.approx(fpr, abs=0.004)
    # Without an allowance the rate would have grown with the length.
    assert unallowed / total > 0.75 * fpr * longer
    assert fpr / 2 < flagged / total <= 2 * fpr
