"""Scores against slow float64 computations on their own formulas, with outliers planted to be found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.bank import OWN, is_own
from guard.errors import CalibrationError
from guard.scores import (
    FEWEST,
    RIDGES,
    SHORTEST,
    BankSpace,
    Density,
    Detector,
    Exceedance,
    Moments,
    Tokens,
    along,
)
from guard.verdict import DETECTORS, DetectorName

from .planted import (
    CHOSEN,
    SLOTS,
    SPACE,
    Array,
    clean_rows,
    float64,
    generator,
    measured,
    naive_density,
    naive_exceedance,
    naive_features,
    naive_moments,
    naive_shares,
    scored,
    shape,
    tokens,
)

HIDDEN = 64
FEW = settings(max_examples=60, deadline=None)


def unit_directions(count: int = 5, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, HIDDEN, generator=generator(seed))
    return torch.nn.functional.normalize(rows)


def detectors() -> dict[DetectorName, Detector]:
    return shape().detectors(SPACE)


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.01, 1.0, 500.0])
def test_cosines_lengths_and_what_was_written_agree_with_float64(dtype: torch.dtype, size: float) -> None:
    before = (size * torch.randn(50, HIDDEN, generator=generator(7))).to(dtype)
    residual = (size * torch.randn(50, HIDDEN, generator=generator(1))).to(dtype)
    directions = unit_directions()
    rows, others = float64(residual), float64(directions)
    lengths = np.linalg.norm(rows, axis=1)
    found = measured(residual, along(before, directions), directions)
    assert found.dtype == torch.float32
    assert found.shape == (50, 11)
    np.testing.assert_allclose(found[:, :5], rows @ others.T / lengths[:, None], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[:, 5:10], (rows - float64(before)) @ others.T, rtol=0, atol=1e-5 * size)
    np.testing.assert_allclose(found[:, -1], lengths, rtol=1e-6)


@pytest.mark.parametrize("length", [2 * SHORTEST, 1e-10, 1e15, 1e18])
def test_a_residual_that_float32_can_just_hold_is_measured_exactly(length: float) -> None:
    row = torch.nn.functional.normalize(torch.randn(1, HIDDEN, generator=generator(2)))
    directions = unit_directions()
    found = measured(length * row, torch.zeros(1, 5), directions)[0]
    projected = (float64(row) @ float64(directions).T)[0]
    np.testing.assert_allclose(found[:5], projected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[5:-1], length * projected, rtol=0, atol=1e-5 * length)
    assert float(found[-1]) == pytest.approx(length, rel=1e-5)


def test_a_planted_direction_has_the_cosine_the_length_and_the_writing_it_was_planted_with() -> None:
    basis = torch.linalg.qr(torch.randn(HIDDEN, 3, generator=generator(2))).Q.T
    residual = 40 * (0.6 * basis[0] - 0.8 * basis[1])
    entered = along((30 * basis[1] + 5 * basis[2])[None], basis)
    found = measured(residual[None], entered, basis)[0].tolist()
    assert found == pytest.approx([0.6, -0.8, 0.0, 24.0, -62.0, -5.0, 40.0], abs=1e-4)


SPOILS = {
    "zero": 0.0,
    "too long": 1e25,  # Finite, but its square is not; the cosines would be zeros, and zeros look clean.
    "too short": 1e-25,  # Not zero, but its square is.
    "subnormal": 1e-42,
}


@pytest.mark.parametrize("spoil", [*SPOILS, "nan", "inf", "-inf"])
def test_what_cannot_be_measured_is_nan_under_every_detector_and_spoils_no_other_row(spoil: str) -> None:
    residual = torch.randn(4, HIDDEN, generator=generator(3))
    directions = unit_directions(SPACE.size)
    entered = torch.randn(4, SPACE.size, generator=generator(8))
    before = measured(residual, entered, directions)
    if spoil in SPOILS:
        residual[2] = SPOILS[spoil]
    else:
        residual[2, 3] = float(spoil)
    after = measured(residual, entered, directions)
    assert after[2].isnan().all()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    for detector in detectors().values():
        for phase in (0, 1):
            cosines, written, length = torch.split(after, [SPACE.size, SPACE.size, 1], dim=-1)
            some = Tokens(cosines, written, length.expand(-1, 3), torch.full((4,), phase), torch.tensor([0, 1, 2, 1]))
            values = detector.values(some)
            assert values.isnan().tolist() == [False, False, True, False]
            assert not values[2] <= 1e30


@pytest.mark.parametrize("spoil", ["nan", "inf"])
def test_what_enters_a_layer_spoiled_is_nan_to_density(spoil: str) -> None:
    before = torch.randn(3, HIDDEN, generator=generator(3))
    before[1, 5] = float(spoil)
    directions = unit_directions(SPACE.size)
    after = measured(torch.randn(3, HIDDEN, generator=generator(4)), along(before, directions), directions)
    cosines, written, length = torch.split(after, [SPACE.size, SPACE.size, 1], dim=-1)
    some = Tokens(
        cosines, written, length.expand(-1, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    )
    found = {name: (~each.values(some).isfinite()).tolist() for name, each in detectors().items()}
    assert found["density"] == found["intrinsic"] == [False, True, False]


def test_a_bank_space_knows_the_layer_and_the_origin_of_each_coordinate() -> None:
    rows = torch.arange(24.0).reshape(2, 12)
    assert [part.shape[1] for part in SPACE.split(rows)] == [4, 3, 5]
    assert torch.equal(torch.cat(SPACE.split(rows), dim=1), rows)
    assert SPACE.layer_slot().tolist() == list(SLOTS)
    assert SPACE.of_delta().tolist() == list(CHOSEN["density"])
    assert SPACE.of_weights().tolist() == list(CHOSEN["intrinsic"])
    assert BankSpace((2,), (4,), ("a", "b", "c", "d")).size == 4


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("L3.own_o_proj.u0", True),
        ("L31.own_down_proj.u19", True),
        ("L3.o_proj.u0", False),
        ("L3.down_proj.own_.u1", False),
        ("own_o_proj", False),
        ("", False),
    ],
)
def test_a_direction_says_in_its_name_that_it_is_the_models_own(name: str, own: bool) -> None:
    assert is_own(name) == own
    assert OWN == "own_"


def test_a_slice_of_tokens_is_of_all_they_hold() -> None:
    some = tokens(9, 5)
    rows = torch.tensor([7, 2])
    part = some[rows]
    assert len(part) == 2
    assert torch.equal(part.coordinates, some.coordinates[[7, 2]])
    assert torch.equal(part.written, some.written[[7, 2]])
    assert torch.equal(part.lengths, some.lengths[[7, 2]])
    assert torch.equal(part.phases, some.phases[[7, 2]])
    assert torch.equal(part.roles, some.roles[[7, 2]])


# -- moments ----------------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 1e4]))
def test_moments_of_any_parts_are_those_of_all_rows_at_once(counts: list[int], seed: int, shift: float) -> None:
    rows = torch.randn(sum(counts), 5, generator=generator(seed)) * torch.tensor([1e-3, 1, 1, 10, 0]) + shift
    mean, covariance = naive_moments(float64(rows)) if len(rows) > 1 else (float64(rows)[0], np.zeros((5, 5)))
    nothing = Moments(0, torch.full((5,), 7.0, dtype=torch.float64), torch.ones(5, 5, dtype=torch.float64))
    for found in (
        Moments.of(rows),
        Moments.merged([Moments.of(part) for part in torch.split(rows, counts)]),
        Moments.merged([nothing, *(Moments.of(part) for part in torch.split(rows, counts)), nothing]),
    ):
        assert found.count == len(rows)
        assert found.mean.dtype == found.covariance.dtype == torch.float64
        np.testing.assert_allclose(found.mean, mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-9, atol=1e-12)


# -- density ----------------------------------------------------------------------------------------------------------


def some_space(widths: Sequence[int]) -> tuple[BankSpace, list[int]]:
    slots = [slot for slot, width in enumerate(widths) for _ in range(width)]
    return BankSpace(tuple(range(len(widths))), tuple(widths), tuple(f"d{i}" for i in range(len(slots)))), slots


@FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 10_000), st.data())
def test_density_is_the_mahalanobis_distance_that_float64_gives(
    widths: list[int], seed: int, data: st.DataObject
) -> None:
    space, slots = some_space(widths)
    source = np.random.default_rng(seed)
    chosen = sorted(data.draw(st.sets(st.integers(0, space.size - 1), min_size=1)))
    scales = 10.0 ** source.integers(-3, 4, size=len(widths))
    # Layers that write very differently much, directions that depend on each other, and two phases.
    clean = [
        source.normal(size=(50, 2 * space.size))
        @ source.normal(size=(2 * space.size, 2 * space.size))
        * np.tile(scales[slots], 2)
        for _ in (0, 1)
    ]
    moments = [naive_moments(rows) for rows in clean]
    detector = Density(
        "density",
        space,
        tuple(Moments(50, torch.from_numpy(mean), torch.from_numpy(cov)) for mean, cov in moments),  # type: ignore[arg-type]
        torch.tensor(chosen),
    )
    written = torch.from_numpy(source.normal(size=(8, space.size)) * scales[slots]).float()
    phases = torch.from_numpy(source.integers(0, 2, size=8))
    lengths = torch.from_numpy(np.abs(source.normal(size=(8, len(widths)))) * scales + 1e-4).float()
    cosines = torch.from_numpy(source.uniform(-1, 1, size=(8, space.size))).float()
    found = scored(detector, Tokens(cosines, written, lengths, phases, torch.zeros(8, dtype=torch.int64)))
    assert found.values.dtype == torch.float32
    rows = np.concatenate([float64(cosines) * float64(lengths)[:, slots], float64(written)], axis=1)
    for index, phase in enumerate(phases.tolist()):
        mean, covariance = moments[phase]
        value, slot, worst = naive_density(rows[index], mean, covariance, chosen, slots)
        # Usual distances are about 1; what is left of one near 0 is float32's rounding of the mean.
        assert float(found.values[index]) == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert (int(found.layer_slots[index]), int(found.coordinates[index])) == (slot, worst)


@pytest.mark.parametrize("name", ["density", "intrinsic"])
def test_density_reads_the_directions_of_its_name_and_the_moments_of_the_phase(name: DetectorName) -> None:
    clean, some = shape(), tokens(40, 6, spread=0.3)
    found = scored(detectors()[name], some)
    rows = naive_features(some)
    for index, phase in enumerate(some.phases.tolist()):
        moments = clean.decisions[phase]
        mean, covariance = float64(moments.mean), float64(moments.covariance)
        expected = naive_density(rows[index], mean, covariance, CHOSEN[name])
        assert float(found.values[index]) == pytest.approx(expected[0], rel=1e-5)
        assert (int(found.layer_slots[index]), int(found.coordinates[index])) == expected[1:]
    # What the detector does not read changes nothing.
    others = [place for place in range(SPACE.size) if place not in CHOSEN[name]]
    some.written[:, others] = math.nan
    some.coordinates[:, others] = math.nan
    assert torch.equal(detectors()[name].values(some), found.values)


def test_shares_say_what_every_coordinate_adds_to_the_squared_distance() -> None:
    some = tokens(40, 6, spread=0.3)
    detector = shape().detectors(SPACE)["intrinsic"]
    assert isinstance(detector, Density)
    found, values = detector.shares(some), detector.values(some)
    rows = naive_features(some)
    for index, phase in enumerate(some.phases.tolist()):
        moments = shape().decisions[phase]
        mean, covariance = float64(moments.mean), float64(moments.covariance)
        expected = naive_shares(rows[index], mean, covariance, CHOSEN["intrinsic"])
        np.testing.assert_allclose(found[index], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert float(found[index].sum()) == pytest.approx(12 * float(values[index]) ** 2, rel=1e-4)


def test_clean_tokens_have_a_density_of_one_less_what_the_ridge_takes() -> None:
    for phase in (0, 1):
        own = tokens(5000, 20 + phase, 0.1 + 0.1 * phase, phases=[phase] * 5000)
        values = shape(decisions=5000).detectors(SPACE)["density"].values(own)
        assert 1 / (1 + 2 * max(RIDGES)) < float(values.square().mean()) < 1.03


def of_features(rows: Array, phase: int) -> Tokens:
    """Tokens with these features [T, 2 size]."""
    standing, written = torch.from_numpy(rows).float().split(SPACE.size, dim=1)
    some = torch.full((len(rows),), phase)
    return Tokens(standing, written, torch.ones(len(rows), 3), some, torch.ones_like(some))


def quiet_in(feature: int) -> tuple[Moments, Moments]:
    """Moments of clean tokens, which never vary in one feature."""
    found = []
    for phase in (0, 1):
        rows = naive_features(tokens(80, 30 + phase))
        rows[:, feature] = 0.25
        found.append(Moments(80, *map(torch.from_numpy, naive_moments(rows))))
    return found[0], found[1]


@pytest.mark.parametrize("feature", range(2 * SPACE.size))
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("phase", [0, 1])
def test_a_shift_where_clean_never_varies_is_found_with_its_layer_and_coordinate(
    feature: int, sign: int, phase: int
) -> None:
    clean = quiet_in(feature)
    coordinate = feature % SPACE.size
    name: DetectorName = "density" if coordinate in CHOSEN["density"] else "intrinsic"
    detector = Density(name, SPACE, clean, torch.tensor(CHOSEN[name]))
    own = [feature - coordinate + place for place in CHOSEN[name] if SLOTS[place] == SLOTS[coordinate]]
    spread = float(clean[phase].covariance.diagonal()[own].mean().sqrt()) or 1.0
    # Token 3 stands as far from the mean there as the layer's other features usually do, twelve times over.
    rows = clean[phase].mean.repeat(5, 1) + 0.2 * torch.randn(5, 2 * SPACE.size, generator=generator(4)).double() * (
        clean[phase].covariance.diagonal().sqrt()
    )
    rows[3, feature] += sign * 12 * spread
    found = scored(detector, of_features(rows.numpy(), phase))
    assert int(found.values.argmax()) == 3
    assert float(found.values[3]) > 4 * float(found.values[[0, 1, 2, 4]].max())
    assert (int(found.coordinates[3]), int(found.layer_slots[3])) == (coordinate, SLOTS[coordinate])


def test_clean_decisions_that_are_all_the_same_still_give_scores() -> None:
    size = 2 * SPACE.size
    same = Moments(20, torch.ones(size).double(), torch.zeros(size, size).double())
    detector = Density("density", SPACE, (same, same), torch.tensor(CHOSEN["density"]))
    rows = np.ones((2, size))
    rows[1, 8] += 2
    for phase in (0, 1):
        found = scored(detector, of_features(rows, phase))
        assert found.values.tolist() == pytest.approx([0.0, math.sqrt(4 / RIDGES[0] / 12)])
        assert int(found.coordinates[1]) == 8


@pytest.mark.parametrize("phase", [0, 1])
def test_too_few_clean_decisions_make_no_density(phase: int) -> None:
    moments = [Moments.of(torch.randn(20, 2 * SPACE.size, generator=generator(0))) for _ in (0, 1)]
    moments[phase] = Moments(FEWEST - 1, moments[phase].mean, moments[phase].covariance)
    with pytest.raises(CalibrationError, match=f"7 clean decisions, expected at least {FEWEST}"):
        Density("density", SPACE, (moments[0], moments[1]), torch.tensor(CHOSEN["density"]))


# -- exceedance -------------------------------------------------------------------------------------------------------


def test_exceedance_agrees_with_a_float64_loop_over_mixed_roles() -> None:
    clean = shape()
    some = tokens(90, 5, spread=0.2)
    found = scored(detectors()["exceedance"], some)
    assert found.values.dtype == torch.float32
    low, high = float64(clean.low), float64(clean.high)
    for index, role in enumerate(some.roles.tolist()):
        row = float64(some.coordinates[index])
        value, coordinate = naive_exceedance(row, low[role], high[role], CHOSEN["exceedance"])
        assert float(found.values[index]) == pytest.approx(value, abs=1e-6)
        assert int(found.coordinates[index]) == coordinate
        assert int(found.layer_slots[index]) == SLOTS[coordinate]
    assert (found.values > 0).any()
    assert (found.values < 0).any()


@pytest.mark.parametrize("absent", [{0}, {2}, {0, 1}, {1, 2}])
def test_a_role_without_clean_tokens_has_the_range_of_all_the_others(absent: set[int]) -> None:
    clean = shape()
    low, high = clean.low.clone(), clean.high.clone()
    for role in absent:
        low[role], high[role] = math.inf, -math.inf
    chosen = torch.tensor(CHOSEN["exceedance"])
    some = tokens(60, 7, spread=0.2)
    found = scored(Exceedance(SPACE, low, high, chosen), some)
    present = [role for role in range(3) if role not in absent]
    for index, role in enumerate(some.roles.tolist()):
        use = present if role in absent else [role]
        widest = float64(clean.low)[use].min(axis=0), float64(clean.high)[use].max(axis=0)
        value, where = naive_exceedance(float64(some.coordinates[index]), *widest, CHOSEN["exceedance"])
        assert float(found.values[index]) == pytest.approx(value, abs=1e-6)
        assert int(found.coordinates[index]) == where


@pytest.mark.parametrize("coordinate", CHOSEN["exceedance"])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("role", [0, 1, 2])
def test_an_outlier_in_one_coordinate_is_named_by_exceedance(coordinate: int, sign: int, role: int) -> None:
    clean = shape()
    rows = ((clean.low + clean.high) / 2)[[role] * 5]
    rows[3, coordinate] += sign * 9
    outside = scored(
        detectors()["exceedance"],
        Tokens(rows, rows, torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 0]), torch.full((5,), role)),
    )
    assert int(outside.values.argmax()) == 3
    assert (outside.values[[0, 1, 2, 4]] < 0).all()
    assert (int(outside.coordinates[3]), int(outside.layer_slots[3])) == (coordinate, SLOTS[coordinate])


@pytest.mark.parametrize("seed", range(5))
def test_the_papers_rule_is_exceedance_above_its_epsilon(seed: int) -> None:
    """WeightWatch, section 3: anomalous where any cosine lies outside [min - 0.01, max + 0.01] of the clean ones."""
    clean = [float64(clean_rows(200, 100 * seed + role)) for role in range(3)]
    low = torch.from_numpy(np.stack([rows.min(axis=0) for rows in clean])).float()
    high = torch.from_numpy(np.stack([rows.max(axis=0) for rows in clean])).float()
    every = list(range(SPACE.size))
    some = tokens(400, seed, spread=0.12)
    found = Exceedance(SPACE, low, high, torch.tensor(every)).values(some) > 0.01

    def paper(row: Array, rows: Array) -> bool:
        return any(not rows[:, i].min() - 0.01 <= row[i] <= rows[:, i].max() + 0.01 for i in every)

    expected = [
        paper(row, clean[role]) for row, role in zip(float64(some.coordinates), some.roles.tolist(), strict=True)
    ]
    assert found.tolist() == expected
    assert 20 < sum(expected) < 380


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("coordinate", range(SPACE.size))
def test_a_single_coordinate_that_is_nan_makes_the_score_nan_where_it_is_read(
    name: DetectorName, coordinate: int
) -> None:
    some = tokens(3, 4)
    some.coordinates[1, coordinate] = some.written[1, coordinate] = math.nan
    values = detectors()[name].values(some)
    assert values.isnan().tolist() == [False, coordinate in CHOSEN[name], False]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_batch_is_scored_like_its_rows_one_by_one(name: DetectorName) -> None:
    some = tokens(50, 7, spread=0.3)
    whole = scored(detectors()[name], some)
    for index in range(50):
        single = scored(detectors()[name], some[index : index + 1])
        assert float(single.values[0]) == pytest.approx(float(whole.values[index]), rel=1e-5, abs=1e-5)
        assert int(single.layer_slots[0]) == int(whole.layer_slots[index])
        assert int(single.coordinates[0]) == int(whole.coordinates[index])


@pytest.mark.parametrize("name", DETECTORS)
def test_no_tokens_have_no_scores(name: DetectorName) -> None:
    assert len(detectors()[name].values(tokens(3, 1)[:0])) == 0


OWN_ONLY = BankSpace((2, 3), (2, 2), ("L2.own_o_proj.u0", "L2.own_o_proj.u1", "L3.own_o_proj.u0", "L3.own_o_proj.u1"))
DELTA_ONLY = BankSpace((2, 3), (2, 2), ("L2.o_proj.u0", "L2.o_proj.u1", "L3.o_proj.u0", "L3.o_proj.u1"))


@pytest.mark.parametrize(
    ("space", "expected"), [(OWN_ONLY, ["intrinsic", "exceedance"]), (DELTA_ONLY, ["density", "exceedance"])]
)
def test_a_bank_with_one_kind_of_directions_has_the_detectors_for_them(space: BankSpace, expected: list[str]) -> None:
    rows = torch.randn(30, 4, generator=generator(1))
    moments = Moments.of(torch.randn(30, 8, generator=generator(2)))
    low, high = rows.amin(dim=0).repeat(3, 1), rows.amax(dim=0).repeat(3, 1)
    found = type(shape())(low, high, (moments, moments), ()).detectors(space)
    assert list(found) == expected
    far = torch.zeros(1, 4)
    far[0, 3] = 50.0
    for name, detector in found.items():
        assert detector.name == name
        scores = scored(detector, Tokens(far, far, torch.ones(1, 2), torch.tensor([1]), torch.tensor([2])))
        assert float(scores.values) > 10
        assert int(scores.coordinates) == 3
        assert detector.every_token == (name == "exceedance")
