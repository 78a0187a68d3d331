"""The truncated decomposition against the exact one, and the rank rule against known noise."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from guard.svd import EXACT_SIDE, RoundingNoise, numerical_rank, truncated_svd

from .planted import low_rank, worst_cosine

ROWS, COLUMNS = 2 * EXACT_SIDE, 3 * EXACT_SIDE


@cache
def bases() -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns, float64 [ROWS, ROWS] and [COLUMNS, ROWS]: the truth that matrices here are planted with."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=generator, dtype=torch.float64)).Q
    return left, right


def falling(decay: float) -> torch.Tensor:
    return torch.arange(1, ROWS + 1, dtype=torch.float64) ** -decay


def decaying(decay: float) -> torch.Tensor:
    """A float32 matrix with singular values i^-decay."""
    left, right = bases()
    return ((left * falling(decay)) @ right.T).float()


@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0, 2.0])
def test_the_truncated_decomposition_holds_the_energy_of_the_exact_one(decay: float) -> None:
    spectrum = truncated_svd(decaying(decay), 20, seed=0)

    exact = falling(decay)
    assert float(spectrum.values.square().sum() / exact[:20].square().sum()) >= 0.999
    assert float(spectrum.values.square().sum() / exact[:20].square().sum()) <= 1.0 + 1e-6
    assert spectrum.energy == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert spectrum.captured == pytest.approx(float(exact[:20].square().sum() / exact.square().sum()), rel=1e-3)


def test_separated_singular_values_and_vectors_are_exact() -> None:
    spectrum = truncated_svd(decaying(1.0), 20, seed=0)
    assert spectrum.values.tolist() == pytest.approx(falling(1.0)[:20].tolist(), rel=1e-6)
    assert worst_cosine(spectrum.vectors, bases()[0].T[:20]) > 0.9999


def test_a_small_matrix_is_decomposed_as_numpy_does() -> None:
    matrix = torch.randn(48, 70, generator=torch.Generator().manual_seed(0))
    left, values, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    spectrum = truncated_svd(matrix, 20, seed=0)
    assert spectrum.values.tolist() == pytest.approx(values[:20].tolist(), rel=1e-12)
    assert worst_cosine(spectrum.vectors, torch.from_numpy(left.T[:20])) > 1 - 1e-9


def test_one_seed_gives_one_result() -> None:
    first, second = truncated_svd(decaying(0.5), 5, seed=3), truncated_svd(decaying(0.5), 5, seed=3)
    other = truncated_svd(decaying(0.5), 5, seed=4)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_a_delta_of_two_rows_has_two_singular_values() -> None:
    matrix = torch.zeros(ROWS, COLUMNS)
    matrix[3], matrix[400, :9] = 1.0, -2.0
    exact = torch.linalg.svdvals(matrix[[3, 400]].double())
    spectrum = truncated_svd(matrix, 20, seed=0)
    assert numerical_rank(spectrum, None) == 2
    assert spectrum.values[:2].tolist() == pytest.approx(exact.tolist(), rel=1e-12)


@pytest.mark.parametrize("peak", [1e-45, 1e-39, 3.4e38])
@pytest.mark.parametrize("rows", [16, ROWS])
def test_the_ends_of_float32_are_decomposed(peak: float, rows: int) -> None:
    matrix = torch.zeros(rows, COLUMNS)
    matrix[2, 5] = peak
    expected = float(matrix[2, 5])
    spectrum = truncated_svd(matrix, 3, seed=0)
    assert numerical_rank(spectrum, None) == 1
    assert float(spectrum.values[0]) == pytest.approx(expected, rel=1e-6)
    assert abs(float(spectrum.vectors[0, 2])) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_tiny_and_huge_deltas_neither_underflow_nor_overflow(scale: float) -> None:
    usual, scaled = truncated_svd(decaying(1.0), 5, seed=0), truncated_svd(decaying(1.0) * scale, 5, seed=0)
    assert (scaled.values / scale).tolist() == pytest.approx(usual.values.tolist(), rel=1e-9)
    assert scaled.captured == pytest.approx(usual.captured, rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 300), (300, 8), (1, 1), (600, 20)])
def test_a_matrix_with_a_short_side_gives_no_more_than_that(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    spectrum = truncated_svd(matrix, 50, seed=0)
    assert len(spectrum.values) == min(50, *shape)
    assert spectrum.vectors.shape == (min(50, *shape), shape[0])


def noise_of(variance: torch.Tensor) -> RoundingNoise:
    return RoundingNoise.of_variances(variance.sum(dim=1), variance.sum(dim=0))


def test_pure_noise_has_rank_zero() -> None:
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    spectrum = truncated_svd(noise.clone(), 20, seed=0)
    assert numerical_rank(spectrum, noise_of(torch.ones(ROWS, COLUMNS).double())) == 0


def test_spikes_above_the_noise_count_and_the_noise_does_not() -> None:
    edge = ROWS**0.5 + COLUMNS**0.5
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    spikes = low_rank(ROWS, COLUMNS, [4 * edge, 3 * edge, 2 * edge], seed=2).float()
    spectrum = truncated_svd(noise + spikes, 20, seed=0)
    assert numerical_rank(spectrum, noise_of(torch.ones(ROWS, COLUMNS).double())) == 3


def test_noise_that_storage_cannot_explain_stays() -> None:
    """A real update may be as shapeless as noise; only what rounding can do is taken for rounding."""
    update = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    spectrum = truncated_svd(update, 20, seed=0)
    assert numerical_rank(spectrum, noise_of(torch.full((ROWS, COLUMNS), 0.25, dtype=torch.float64))) == 20


def test_a_small_structured_delta_under_coarse_storage_stays() -> None:
    """Storage could explain values of this size, but not with so little energy beside them."""
    delta = low_rank(ROWS, COLUMNS, [1.0, 0.9, 0.8], seed=2).float()
    spectrum = truncated_svd(delta, 20, seed=0)
    assert numerical_rank(spectrum, noise_of(torch.ones(ROWS, COLUMNS).double())) >= 3


def test_without_storage_noise_only_arithmetic_noise_is_dropped() -> None:
    spectrum = truncated_svd(low_rank(64, 96, [1.0, 1e-4], seed=2).float(), 20, seed=0)
    exact = low_rank(64, 96, [1.0, 1e-4], seed=2)
    assert numerical_rank(spectrum, None) > 2
    values = torch.linalg.svdvals(exact)
    assert int((values > torch.finfo(torch.float64).eps * 96 * values[0]).sum()) == 2
