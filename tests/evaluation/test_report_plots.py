"""Axes and the SVG that is drawn between them."""

from __future__ import annotations

import math
import re

import pytest

from guard.evaluation.report.plots import Axis, Panel, mini, quantile, strip


def numbers(svg: str) -> list[float]:
    """Every coordinate of a drawing."""
    told = re.findall(r' (?:d|x|y|x1|x2|y1|y2|cx|cy|r|width|height|viewBox)="([^"]*)"', svg)
    return [
        float(number) for text in told for number in re.findall(r"-?[a-z]*\d*\.?\d+|nan|inf", text.replace("h0", ""))
    ]


@pytest.mark.parametrize(
    ("axis", "value", "place"),
    [
        (Axis.share("y"), 0.25, 0.25),
        (Axis.share("y"), 2.0, 1.0),
        (Axis.log(0.001, 1, "x"), 0.001, 0.0),
        (Axis.log(0.001, 1, "x"), 0.1, 2 / 3),
        (Axis.log(0.001, 1, "x"), 0.0, 0.0),
        (Axis.linear([0, 37], "x"), 20, 0.5),
        (Axis.linear([-1, 1], "x"), 0, 0.5),
        (Axis.steps(["a", "b", "c"], "x"), 1, 0.5),
    ],
)
def test_an_axis_puts_values_between_its_ends(axis: Axis, value: float, place: float) -> None:
    assert axis.at(value) == pytest.approx(place)


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis.share("y"), ["0%", "20%", "40%", "60%", "80%", "100%"]),
        (Axis.share("y", 0.02), ["0%", "0.5%", "1%", "1.5%", "2%"]),
        (Axis.log(0.001, 1, "x"), ["0.001", "0.01", "0.1", "1"]),
        (Axis.log(8, 480, "x"), ["5", "10", "20", "50", "100", "200", "500"]),
        (Axis.sizes([400, 500, 20000], "x"), ["400", "20k"]),
        (Axis.linear([], "x"), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis.steps(["0", "0.1"], "x"), ["0", "0.1"]),
    ],
)
def test_ticks_are_round(axis: Axis, texts: list[str]) -> None:
    assert [axis.text(tick) for tick in axis.ticks] == texts


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf], [0.0], [1e-300], [5.0, 5.0], [1e12]])
def test_no_coordinate_is_ever_infinite(values: list[float]) -> None:
    panel = Panel(Axis.linear(values, "x"), Axis.linear(values, "y"))
    points = [(value, value) for value in values]
    panel.line(points, "c0", "line", dots=True)
    panel.scatter(points, "c1", "scatter")
    panel.stairs(points, "c2", "stairs")
    for value in values:
        panel.vertical(value, "x")
        panel.horizontal(value, "y")
    drawn = panel.svg("all of it")
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert all(math.isfinite(number) and -50 <= number <= 400 for number in numbers(drawn))


def test_a_line_breaks_where_a_value_is_missing() -> None:
    panel = Panel(Axis.share("x"), Axis.share("y"))
    panel.line([(0, 0), (0.2, 0.5), (0.4, math.nan), (0.6, 0.5), (1, 1)], "c0", "broken")
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', panel.svg(""))
    assert path.count("M") == 2


def test_a_lone_point_is_a_dot() -> None:
    panel = Panel(Axis.share("x"), Axis.share("y"))
    panel.line([(0.5, 0.5)], "c0", "alone")
    assert 'class="dot c0"' in panel.svg("")


def test_stairs_hold_a_value_until_the_next() -> None:
    panel = Panel(Axis.share("x"), Axis.share("y"), width=156, height=148)
    panel.stairs([(0, 0), (1, 1)], "c0", "stairs")
    assert 'd="M44.0 110.0 L144.0 110.0 L144.0 10.0"' in panel.svg("")


def test_a_strip_without_values_still_shows_the_target() -> None:
    drawn = strip([], Axis.share("", 0.02), 0.01, (0.005, 0.015), "nothing")
    assert 'class="rule"' in drawn
    assert "circle" not in drawn


def test_a_strip_has_one_dot_per_value() -> None:
    drawn = strip([0.01, 0.01, 0.012, math.nan], Axis.share("", 0.02), 0.01, (0.005, 0.015), "three")
    assert drawn.count("<circle") == 2
    assert "1.0%: 2 of 3" in drawn


def test_a_share_beyond_its_axis_is_drawn_at_the_end() -> None:
    assert 'x1="100.0" x2="100.0"' in mini(0.9, 0.8, 1.0, 0.05, "false")


def test_a_quantile_lies_between_its_neighbours() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([7.0], 0.95) == 7.0
