"""Scores against slow float64 loops, with outliers planted to be found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guard.scores import (
    NEAREST,
    BankSpace,
    Density,
    Detector,
    Exceedance,
    cosines,
    density_scales,
    neighbour,
)

from .planted import SLOTS, SPACE, clean_rows, float64, generator, naive_density, naive_exceedance, naive_nearest, shape

HIDDEN = 64


def unit_directions(count: int = 5, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, HIDDEN, generator=generator(seed))
    return torch.nn.functional.normalize(rows)


def detectors() -> list[Detector]:
    return list(shape().detectors(SPACE).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.01, 1.0, 500.0])
def test_cosines_agree_with_float64(dtype: torch.dtype, size: float) -> None:
    residual = (size * torch.randn(50, HIDDEN, generator=generator(1))).to(dtype)
    directions = unit_directions()
    rows, others = float64(residual), float64(directions)
    lengths = np.linalg.norm(rows, axis=1)[:, None]
    assert cosines(residual, directions).dtype == torch.float32
    np.testing.assert_allclose(cosines(residual, directions), rows @ others.T / lengths, rtol=0, atol=1e-6)


def test_a_planted_direction_has_the_cosine_it_was_planted_with() -> None:
    basis = torch.linalg.qr(torch.randn(HIDDEN, 3, generator=generator(2))).Q.T
    residual = 40 * (0.6 * basis[0] - 0.8 * basis[1])
    assert cosines(residual[None], basis)[0].tolist() == pytest.approx([0.6, -0.8, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.zero_(),
        lambda row: row[3:4].fill_(math.nan),
        lambda row: row[3:4].fill_(math.inf),
        lambda row: row[3:4].fill_(-math.inf),
        # Finite, but its square is not; the cosines would be zeros, and zeros look clean.
        lambda row: row.fill_(1e25),
        # Not zero, but its square is.
        lambda row: row.fill_(1e-25),
    ],
    ids=["zero", "nan", "inf", "-inf", "too long", "too short"],
)
def test_what_cannot_be_scored_is_nan_under_every_detector_and_spoils_no_other_row(spoil: object) -> None:
    residual = torch.randn(4, HIDDEN, generator=generator(3))
    directions = unit_directions(SPACE.size)
    before = cosines(residual, directions)
    spoil(residual[2])  # type: ignore[operator]
    after = cosines(residual, directions)
    assert after[2].isnan().all()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    for detector in detectors():
        for phase in (0, 1):
            values = detector.score(after, torch.full((4,), phase)).values
            assert values.isnan().tolist() == [False, False, True, False]
            assert not values[2] <= 1e30


@pytest.mark.parametrize("coordinate", range(SPACE.size))
@pytest.mark.parametrize("detector", [0, 1])
def test_a_single_coordinate_that_is_nan_makes_the_score_nan(coordinate: int, detector: int) -> None:
    rows = clean_rows(3, 4)
    rows[1, coordinate] = math.nan
    scores = detectors()[detector].score(rows, torch.tensor([0, 1, 1]))
    assert scores.values.isnan().tolist() == [False, True, False]


def test_exceedance_agrees_with_a_float64_loop_over_mixed_phases() -> None:
    clean = shape()
    rows, phases = clean_rows(60, 5, spread=0.12), torch.arange(60) % 2
    found = Exceedance(SPACE, clean.low, clean.high).score(rows, phases)
    assert found.values.dtype == torch.float32
    low, high = float64(clean.low), float64(clean.high)
    for index, phase in enumerate(phases.tolist()):
        value, coordinate = naive_exceedance(float64(rows[index]), low[phase], high[phase])
        assert float(found.values[index]) == pytest.approx(value, abs=1e-6)
        assert int(found.coordinates[index]) == coordinate
        assert int(found.layer_slots[index]) == SLOTS[coordinate]
    assert (found.values > 0).any()
    assert (found.values < 0).any()


@pytest.mark.parametrize("nearest", [1, 2, NEAREST, 7])
def test_density_agrees_with_a_float64_loop_over_mixed_phases(nearest: int) -> None:
    clean = shape()
    rows, phases = clean_rows(40, 6, spread=0.3), torch.arange(40) % 2
    rows[7] += 5
    found = Density(SPACE, clean.references, clean.scales, nearest).score(rows, phases)
    assert found.values.dtype == torch.float32
    for index, phase in enumerate(phases.tolist()):
        references, scales = float64(clean.references[phase]), float64(clean.scales[phase])
        value, slot = naive_density(float64(rows[index]), references, scales, nearest)
        assert float(found.values[index]) == pytest.approx(value, rel=1e-5)
        assert int(found.layer_slots[index]) == slot
    assert (found.coordinates == -1).all()


@pytest.mark.parametrize("coordinate", range(SPACE.size))
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("phase", [0, 1])
def test_an_outlier_in_one_coordinate_is_named_by_both_detectors(coordinate: int, sign: int, phase: int) -> None:
    clean = shape()
    rows = clean.references[phase][:5].clone()
    rows[3, coordinate] += sign * 9
    phases = torch.full((5,), phase)
    outside = Exceedance(SPACE, clean.low, clean.high).score(rows, phases)
    assert int(outside.values.argmax()) == 3
    assert (outside.values[[0, 1, 2, 4]] <= 0).all()
    assert (int(outside.coordinates[3]), int(outside.layer_slots[3])) == (coordinate, SLOTS[coordinate])
    far = Density(SPACE, clean.references, clean.scales).score(rows, phases)
    assert int(far.values.argmax()) == 3
    assert int(far.layer_slots[3]) == SLOTS[coordinate]


@pytest.mark.parametrize("detector", [0, 1])
def test_a_batch_is_scored_like_its_rows_one_by_one(detector: int) -> None:
    rows, phases = clean_rows(50, 7, spread=0.3), torch.randint(0, 2, (50,), generator=generator(8))
    whole = detectors()[detector].score(rows, phases)
    for index in range(50):
        single = detectors()[detector].score(rows[index : index + 1], phases[index : index + 1])
        assert float(single.values[0]) == pytest.approx(float(whole.values[index]), rel=1e-6)
        assert int(single.layer_slots[0]) == int(whole.layer_slots[index])
        assert int(single.coordinates[0]) == int(whole.coordinates[index])


def test_two_stray_references_make_no_hole_in_density() -> None:
    clean = shape()
    stray = torch.full((SPACE.size,), 50.0)
    holed = torch.cat([clean.references[0], stray[None], stray[None]])
    value = Density(SPACE, (holed, clean.references[1]), clean.scales).score(stray[None], torch.tensor([0])).values
    assert float(value) > 50


def test_density_scales_are_medians_that_leave_the_reference_itself_out() -> None:
    rows = clean_rows(61, 9)
    exact = float64(rows)
    naive = [naive_nearest(row, np.delete(exact, index, axis=0)) for index, row in enumerate(exact)]
    np.testing.assert_allclose(density_scales(SPACE, rows), np.median(naive, axis=0), rtol=1e-5)


def test_density_scales_do_not_depend_on_how_references_are_cut_into_pieces() -> None:
    rows = clean_rows(1100, 10)
    distances = torch.cdist(rows[:, :3], rows[:, :3]).kthvalue(neighbour(1100) + 1, dim=1).values
    assert float(density_scales(SPACE, rows)[0]) == pytest.approx(float(distances.median()), rel=1e-4)


def test_references_that_are_all_the_same_still_give_a_positive_scale() -> None:
    assert (density_scales(SPACE, torch.zeros(10, SPACE.size)) > 0).all()


def test_a_bank_space_splits_coordinates_by_layer() -> None:
    rows = torch.arange(18.0).reshape(2, 9)
    assert [part.shape[1] for part in SPACE.split(rows)] == [3, 2, 4]
    assert torch.equal(torch.cat(SPACE.split(rows), dim=1), rows)
    assert SPACE.layer_slot().tolist() == list(SLOTS)
    assert BankSpace((2,), (4,), ("a", "b", "c", "d")).size == 4
