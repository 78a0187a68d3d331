"""How a sequence came to be flagged: its scores around the token that flagged, of flagged ones only, and bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.engine.ledger import Ledger
from guard.engine.runner import Rows
from guard.engine.step import Scorer
from guard.engine.trail import AFTER, BEFORE, Trail, window
from guard.evidence import Evidence, Trace
from tests.guard.planted import a_score

from .test_engine_ledger import KEY, SEQUENCE, admitted, policy, record
from .test_engine_step import with_growth

PROMPT = 4


def seen(book: Ledger) -> Ledger:
    """The same, which has read the prompt."""
    book.cover(Rows(SEQUENCE, 0, PROMPT, 0, PROMPT, samples=True))
    return book


def step(book: Ledger, position: int, value: float) -> None:
    """One token of the answer."""
    book.note(SEQUENCE, "density", position, (value,))
    book.score(SEQUENCE, [a_score(value, phase="completion")])


def test_a_sequence_that_is_blocked_says_what_led_there() -> None:
    book = seen(admitted(policy(raw=10.0)))
    for position, value in enumerate((1.0, 2.5, 20.0), PROMPT - 1):
        step(book, position, value)
    assert record(book).action == "block"
    assert record(book).trace == (Trace(detector="density", start=PROMPT - 1, ratios=(0.1, 0.25, 2.0)),)


def test_the_traces_largest_is_the_scores_and_its_first_crossing_where_the_score_says() -> None:
    book = seen(admitted(policy(raw=8.0, action="flag")))
    for position, value in enumerate((1.0, 9.0, 12.0, 3.0), PROMPT):
        book.note(SEQUENCE, "density", position, (value,))
        first = position if value > 8 else None
        score = replace(a_score(value, phase="completion"), position=position, first=first)
        book.score(SEQUENCE, [score])
    [score] = record(book).scores
    [trace] = record(book).trace
    assert max(value for value in trace.ratios if value is not None) == round(score.score / score.threshold, 3)
    crossed = [value is not None and value > 1 for value in trace.ratios].index(True)
    assert trace.start + crossed == score.first == PROMPT + 1


def test_a_clean_sequence_says_nothing_and_keeps_nothing_when_it_ends() -> None:
    book = seen(admitted(policy(raw=100.0)))
    step(book, PROMPT, 1.0)
    assert record(book).trace == ()
    book.finish([SEQUENCE])
    assert record(book).trace == ()
    [entry] = book._by_key[KEY].values()
    assert entry.trails == {}


def test_a_flagged_sequence_that_goes_on_keeps_what_led_there() -> None:
    book = seen(admitted(policy("monitor", raw=10.0)))
    for position in range(PROMPT, PROMPT + 200):
        step(book, position, 20.0 if position == PROMPT + 99 else 1.0)
    book.finish([SEQUENCE])
    [trace] = record(book).trace
    assert len(trace.ratios) == BEFORE + AFTER
    assert trace.ratios.index(2.0) == BEFORE - 1
    assert trace.start + BEFORE - 1 == PROMPT + 99


def test_every_phase_is_held_against_its_own_threshold() -> None:
    book = seen(admitted(policy(fpr=0.1)))
    for position, value, phase in ((PROMPT - 1, 45.5, "prompt"), (PROMPT, 91.5, "completion")):
        book.note(SEQUENCE, "density", position, (value,))
        book.score(SEQUENCE, [a_score(value, phase=phase)])
    thresholds = {score.phase: score.threshold for score in record(book).scores}
    [trace] = record(book).trace
    assert trace.ratios == (round(45.5 / thresholds["prompt"], 3), round(91.5 / thresholds["completion"], 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_null(value: float) -> None:
    book = seen(admitted(policy(raw=10.0)))
    book.note(SEQUENCE, "exceedance", 0, [1.0, value])
    step(book, PROMPT, 20.0)
    told = {trace.detector: trace for trace in record(book).trace}
    assert told["exceedance"].ratios[1] is None
    evidence = Evidence(fingerprint="f", calibration="c", records=(record(book),))
    assert Evidence.from_json(evidence.to_json()).records[0].trace == record(book).trace


def test_scores_of_a_guard_that_was_replaced_are_not_held_against_the_next_ones_thresholds() -> None:
    book = seen(admitted(policy(raw=10.0)))
    step(book, PROMPT, 9.0)
    book.adopt(book)
    step(book, PROMPT + 1, 20.0)
    [trace] = record(book).trace
    assert (trace.start, trace.ratios) == (PROMPT + 1, (2.0,))


def test_a_trail_is_bounded_whatever_it_is_told() -> None:
    trail = Trail()
    for first in (0, 1000, 2000):
        trail.add(first, [0.0] * 48)
    assert trail.points[0][0] == 2000, "another place begins anew"
    trail.add(2048 + 5, [1.0])
    assert len(trail.points) == 49, "drafts that were accepted leave gaps"
    trail.settle()
    trail.add(5000, [2.0])
    trail.add(2054, [2.0])
    assert trail.points[-1] == (2053, 1.0), "once it was flagged it ends where its place does"


def test_what_a_preempted_sequence_computes_again_is_told_once() -> None:
    book = seen(admitted(policy(raw=10.0)))
    for position in range(PROMPT, PROMPT + 6):
        step(book, position, 1.0)
    book.note(SEQUENCE, "density", 0, [5.0] * (PROMPT + 4))
    step(book, PROMPT + 4, 1.0)
    step(book, PROMPT + 6, 20.0)
    [trace] = record(book).trace
    assert (trace.start, trace.ratios) == (PROMPT, (0.1,) * 6 + (2.0,))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70), st.booleans()), max_size=12))
def test_positions_rise_and_are_few_whatever_comes(told: list[tuple[int, int, bool]]) -> None:
    trail = Trail()
    for first, count, settles in told:
        trail.add(first, [0.0] * count)
        if settles:
            trail.settle()
        positions = [position for position, _ in trail.points]
        assert positions == sorted(set(positions))
        assert len(positions) <= BEFORE + AFTER


@pytest.mark.parametrize(
    ("size", "row", "expected"), [(500, None, (452, 500)), (3, None, (0, 3)), (500, 100, (53, 116))]
)
def test_of_a_long_prompt_the_last_scores_or_those_around_the_largest_are_kept(
    size: int, row: int | None, expected: tuple[int, int]
) -> None:
    kept = window(size, row)
    assert (kept.start, kept.stop) == expected


def test_where_a_prompt_flags_far_from_its_end_the_trail_is_of_there() -> None:
    scorer = Scorer.of(with_growth())
    values = np.zeros(400, np.float32)
    values[100] = 5.0
    told: list[tuple[int, list[float]]] = []
    coordinates = torch.zeros(400, dtype=torch.int64).numpy()

    def note(_: str, first: int, some: Sequence[float]) -> None:
        told.append((first, [*some]))

    list(scorer.largest(values, coordinates, 7, 407, lambda _: 0.5, note))
    [(first, some)] = told
    assert some[7 + 100 - first] == pytest.approx(5.0)
    assert len(some) == BEFORE + AFTER - 1
