"""Paired timings: who goes when, what a ratio is, and the interval of a median."""

from __future__ import annotations

import random
from math import comb

import pytest

from guard.benching.paired import Pair, Row, table, take_turns
from guard.benching.shape import SHAPES
from guard.commands.bench import SHAPE_NAMES
from guard.intervals import median_interval


def test_turns_are_taken_in_pairs_and_the_first_changes_every_round() -> None:
    calls: list[tuple[str, int]] = []

    def turn(name: str, number: int) -> float:
        calls.append((name, number))
        return float(len(calls))

    pairs = list(take_turns(lambda number: turn("plain", number), lambda number: turn("guarded", number), 3))
    assert calls == [("plain", 1), ("guarded", 1), ("guarded", 2), ("plain", 2), ("plain", 3), ("guarded", 3)]
    # Each pair is plain first, whoever was timed first.
    assert pairs == [(1.0, 2.0), (4.0, 3.0), (5.0, 6.0)]


def test_a_row_tells_the_median_of_the_ratios_and_not_the_ratio_of_the_medians() -> None:
    pairs = tuple(Pair(plain, guarded) for plain, guarded in ((100, 90), (50, 49), (200, 190)))
    row = Row("decode, batch 1", "tok/s", pairs)
    assert row.ratio == 0.95
    assert row.interval == (0.9, 0.98)
    assert "ratio 0.9500 [0.9000, 0.9800] of 3 pairs" in table([row])


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 20, 51])
def test_the_interval_of_a_median_has_its_confidence_and_is_no_wider_than_it_must_be(count: int) -> None:
    low, high = median_interval([float(value) for value in range(count)])
    assert low + high == count - 1

    def misses(below: int) -> float:
        return sum(comb(count, hits) for hits in range(below + 1)) / 2**count

    place = int(low)
    if place:
        assert misses(place) <= 0.025
    if place + 1 <= (count - 1) // 2:
        assert misses(place + 1) > 0.025


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    chance = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = median_interval([chance.gauss(0, 1) for _ in range(15)])
        held += low <= 0 <= high
    assert held >= 1900


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_every_shape_can_be_named() -> None:
    assert tuple(SHAPES) == SHAPE_NAMES


@pytest.mark.parametrize(("name", "billions"), [("0.4b", 0.4), ("1b", 1.2), ("8b", 7.5)])
def test_shapes_have_about_the_parameters_that_they_are_named_for(name: str, billions: float) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=0.1)
