"""What is taken out of a token depends on its position and on whose it is, and on nothing that vLLM does."""

from __future__ import annotations

import random

import pytest
import torch

from guard.engine.courses import Courses
from guard.engine.finding import Finding
from guard.engine.projection import Directions
from guard.engine.runner import Rows
from guard.engine.turns import Turns
from guard.verdict import DetectorName, Phase, Score, Verdict
from tests.guard.planted import ROLE_MAP

PROMPT = (1, 9, 9, 2, 9, 9, 9, 9, 9, 3, 9)
"""System 0 to 2, user 3 to 8, assistant from 9 on."""
NAMES = [(1, ("L1.o_proj.u0", "L1.o_proj.u1")), (4, ("L4.down_proj.u0",))]
WHOLE = 20


def courses(*sequences: str) -> Courses:
    turns = Turns(ROLE_MAP)
    for name in sequences:
        turns.admit(name, PROMPT)
    return Courses(NAMES, turns)


def rows(first: int, count: int, sequence: str = "a", row: int = 0) -> Rows:
    return Rows(sequence, row, count, first, len(PROMPT), True)


def finding(
    position: int,
    name: str = "L1.o_proj.u0",
    detector: DetectorName = "density",
    phase: Phase = "prompt",
    first: int | None = None,
) -> Finding:
    return Finding(Verdict(Score(detector, phase, 2.0, position, 1, name), 1.0, 0.01), first, 1)


def planned(some: Courses, batch: list[Rows]) -> dict[int, Directions]:
    """By row."""
    found: dict[int, Directions] = {}
    for part in some.plan(batch):
        for row in part.rows.tolist():
            assert row not in found
            found[row] = part.directions
    return found


def test_from_the_token_that_flagged_on_it_included() -> None:
    some = courses("a")
    assert not some
    assert some.turn(rows(0, 11), [finding(10)], None)
    assert planned(some, [rows(0, 11)]) == {10: frozenset({(1, 0)})}
    assert planned(some, [rows(11, 1, row=5)]) == {5: frozenset({(1, 0)})}


def test_the_first_that_is_over_the_threshold_counts_and_not_the_one_furthest_over() -> None:
    some = courses("a")
    some.turn(rows(0, 11), [finding(9, detector="exceedance", first=6)], None)
    assert planned(some, [rows(0, 11)]).keys() == {6, 7, 8, 9, 10}


def test_a_token_whose_state_came_from_the_cache_is_not_changed() -> None:
    some = courses("a")
    some.turn(rows(8, 3), [finding(4, detector="exceedance")], None)
    assert planned(some, [rows(0, 11)]).keys() == {8, 9, 10}


def test_every_detector_and_phase_adds_the_first_direction_that_it_names() -> None:
    some = courses("a")
    assert some.turn(rows(0, 11), [finding(10)], None)
    assert not some.turn(rows(11, 1), [finding(10)], None)
    later = finding(12, "L4.down_proj.u0", phase="completion")
    assert some.turn(rows(12, 1), [finding(10), later], None)
    assert not some.turn(rows(13, 1), [finding(10), finding(13, "L1.o_proj.u1", phase="completion")], None)
    one, both = frozenset({(1, 0)}), frozenset({(1, 0), (4, 0)})
    assert planned(some, [rows(9, 5)]) == {1: one, 2: one, 3: both, 4: both}


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        (("assistant",), {9, 10, 11}),
        (("user",), {6, 7, 8}),
        (("user", "assistant"), {6, 7, 8, 9, 10, 11}),
        (None, None),
    ],
)
def test_only_tokens_of_the_named_roles(roles: tuple[str, ...] | None, kept: set[int] | None) -> None:
    some = courses("a")
    some.turn(rows(0, 11), [finding(6, detector="exceedance")], roles)  # type: ignore[arg-type]
    assert planned(some, [rows(0, 12)]).keys() == (kept or set(range(6, 12)))


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_of_a_token_is_the_same_however_its_pass_was_cut(seed: int) -> None:
    """Chunks, decode steps, and everything again after a preemption."""
    chance = random.Random(seed)
    some = courses("a", "b")
    some.turn(rows(5, 6), [finding(7, detector="exceedance")], chance.choice([None, ("assistant",)]))
    some.turn(rows(13, 1), [finding(13, "L4.down_proj.u0", phase="completion")], None)
    whole = planned(some, [rows(0, WHOLE)])
    first, row, pieces = 0, 3, {}
    while first < WHOLE:
        count = chance.randint(1, WHOLE - first)
        batch = [rows(0, 3, "b"), rows(first, count, row=row)]
        pieces |= {place - row + first: directions for place, directions in planned(some, batch).items()}
        first += count
    assert pieces == whole


def test_a_neighbour_has_no_plan_and_a_finished_sequence_is_forgotten() -> None:
    some = courses("a", "b")
    some.turn(rows(0, 11), [finding(3)], None)
    assert planned(some, [rows(0, 11, "b"), rows(11, 1, row=11)]).keys() == {11}
    some.finish(["b", "a"])
    assert not some
    assert planned(some, [rows(11, 1)]) == {}


def test_every_course_has_a_number_of_its_own() -> None:
    some = courses("a", "b")
    for name in ("a", "b"):
        some.turn(rows(0, 11, name), [finding(10)], None)
    numbers = [course.number for name in ("a", "b") if (course := some.of(name))]
    assert len(set(numbers)) == 2
    assert 0 not in numbers
    assert torch.tensor(numbers).int().tolist() == numbers
