"""A step's scores are those of each sequence alone, in any batch."""

from __future__ import annotations

import math
import random

import pytest
import torch

from guard.engine.runner_v1 import Rows
from guard.engine.step import score_step
from guard.verdict import PHASES, DetectorName, Phase, Score
from tests.guard.planted import SPACE, clean_rows, naive_scores, shape

from .planted import random_batch, reordered

Found = dict[tuple[str, DetectorName, Phase], Score]


def found(batch: list[Rows], coordinates: torch.Tensor) -> Found:
    """What a step says, and that it says nothing twice."""
    everything: Found = {}
    for sequence, scores in score_step(SPACE, shape().detectors(SPACE), coordinates, batch):
        for score in scores:
            key = (sequence, score.detector, score.phase)
            assert key not in everything
            everything[key] = score
    return everything


def naive(
    batch: list[Rows], coordinates: torch.Tensor
) -> dict[tuple[str, DetectorName, Phase], tuple[float, int, int]]:
    """Token by token: the largest value, its position and its layer."""
    best: dict[tuple[str, DetectorName, Phase], tuple[float, int, int]] = {}
    clean = shape()
    slots = SPACE.layer_slot().tolist()
    for rows in batch:
        for offset in range(rows.count):
            position = rows.first_position + offset
            phase = int(position >= rows.prompt_tokens)
            decides = rows.samples and offset == rows.count - 1
            for detector, (value, where) in naive_scores(clean, coordinates[rows.first_row + offset], phase).items():
                if detector == "density" and not decides:
                    continue
                layer = SPACE.layers[slots[where] if detector == "exceedance" else where]
                key = (rows.sequence, detector, PHASES[phase])
                if key not in best or value > best[key][0]:
                    best[key] = (value, position, layer)
    return best


@pytest.mark.parametrize("seed", range(25))
def test_a_batch_is_scored_like_each_token_alone(seed: int) -> None:
    batch, coordinates = random_batch(seed)
    expected, got = naive(batch, coordinates), found(batch, coordinates)
    assert got.keys() == expected.keys()
    for key, (value, position, layer) in expected.items():
        assert got[key].value == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert (got[key].position, got[key].layer) == (position, layer)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_a_batch_does_not_matter(seed: int) -> None:
    batch, coordinates = random_batch(seed)
    order = list(range(len(batch)))
    random.Random(seed).shuffle(order)
    before, after = found(batch, coordinates), found(*reordered(batch, coordinates, order))
    assert before.keys() == after.keys()
    for key, score in before.items():
        assert after[key].value == pytest.approx(score.value, rel=1e-6)
        assert (after[key].position, after[key].layer, after[key].direction) == (
            score.position,
            score.layer,
            score.direction,
        )


def test_a_planted_outlier_is_found_in_its_sequence_position_phase_layer_and_direction() -> None:
    batch = [Rows("a", 0, 4, 0, 4, True), Rows("b", 4, 6, 2, 5, True), Rows("c", 10, 1, 9, 3, True)]
    coordinates = clean_rows(11, 0)
    coordinates[8, 4] = 7.0
    score = found(batch, coordinates)["b", "exceedance", "completion"]
    assert (score.position, score.layer, score.direction) == (6, 4, "d4")
    largest = max(found(batch, coordinates).values(), key=lambda other: other.value * (other.detector == "exceedance"))
    assert largest == score


def test_density_reads_only_rows_that_are_sampled() -> None:
    batch = [Rows("chunk", 0, 4, 0, 9, False), Rows("last", 4, 3, 6, 9, True)]
    coordinates = clean_rows(7, 1)
    before = found(batch, coordinates)
    coordinates[:6] += 50
    after = found(batch, coordinates)
    assert ("chunk", "density", "prompt") not in after
    assert after["last", "density", "prompt"] == before["last", "density", "prompt"]
    assert after["last", "exceedance", "prompt"].value > before["last", "exceedance", "prompt"].value + 40


def test_a_step_in_which_nothing_is_sampled_has_no_density() -> None:
    assert {key[1] for key in found([Rows("chunk", 0, 4, 0, 9, False)], clean_rows(4, 2))} == {"exceedance"}


def test_the_last_prompt_token_is_prompt_and_the_first_generated_one_completion() -> None:
    got = found([Rows("p", 0, 1, 4, 5, True), Rows("c", 1, 1, 5, 5, True)], clean_rows(2, 3))
    assert {(sequence, phase) for sequence, _, phase in got} == {("p", "prompt"), ("c", "completion")}


@pytest.mark.parametrize("row", range(5))
def test_nan_is_the_largest_score_of_its_sequence_and_of_no_other(row: int) -> None:
    batch = [Rows("a", 0, 3, 0, 3, True), Rows("b", 3, 2, 7, 3, True)]
    coordinates = clean_rows(5, 4)
    coordinates[row, 2] = math.nan
    hurt = {key[0] for key, score in found(batch, coordinates).items() if math.isnan(score.value)}
    assert hurt == {"a" if row < 3 else "b"}
    nan = next(score for score in found(batch, coordinates).values() if math.isnan(score.value))
    assert nan.position == (row if row < 3 else 7 + row - 3)
