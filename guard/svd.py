"""The strongest left singular vectors of one matrix, and how many of them are more than rounding noise.

Full decompositions of a large model's matrices take minutes each and throw nearly everything away. `truncated_svd`
builds a randomised block Krylov space instead (Musco & Musco, "Randomized Block Krylov Methods", NeurIPS 2015), whose
accuracy does not depend on gaps between singular values: fine-tuned deltas often decay slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

# Below this smaller side a full float64 decomposition takes well under a second and leaves nothing to approximate.
EXACT_SIDE = 256
OVERSAMPLING = 12
DEPTH = 4
BLOCK_ROWS = 256

# Above the median of the Tracy-Widom law (beta = 1) by enough that noise passes about once in a thousand matrices.
TRACY_WIDOM_QUANTILE = 3.3


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Leading singular values (float64, falling) with their left vectors as float64 rows [K, rows of the matrix].

    `rest` is the energy (squared Frobenius norm) of the matrix beyond these values, `shape` its shape.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    rest: float
    shape: tuple[int, int]

    def head(self, count: int) -> Spectrum:
        """The first `count` of them."""
        dropped = float(self.values[count:].square().sum())
        return Spectrum(self.values[:count], self.vectors[:count], self.rest + dropped, self.shape)

    @property
    def energy(self) -> float:
        """The squared Frobenius norm of the whole matrix."""
        return float(self.values.square().sum()) + self.rest

    @property
    def captured(self) -> float:
        """The fraction of the matrix's energy that these values hold; 0.0 for a matrix of zeros."""
        return 1.0 - self.rest / self.energy if self.energy else 0.0


def truncated_svd(matrix: torch.Tensor, k: int, seed: int) -> Spectrum:
    """The top min(k, shape) singular values and left vectors of a finite float32 matrix [m, n].

    `matrix` is scaled in place, and scaled back: no copy of it is made. The large products run in float32, the
    projection and all orthogonalisation in float64, so singular values carry no float32 rounding of their own.
    Deterministic for a seed on one machine and number of threads.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    if not (peak := float(matrix.abs().max()) if matrix.numel() else 0.0):
        return empty_spectrum(shape)
    # A power of two, so that scaling is exact: products of tiny deltas would underflow, of huge ones overflow.
    scale = 2.0 ** -int(torch.frexp(torch.tensor(peak)).exponent)
    matrix *= scale
    try:
        if min(shape) <= max(EXACT_SIDE, 2 * k):
            left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
            rest = 0.0
        else:
            left, values, rest = _block_krylov(matrix, k + OVERSAMPLING, seed)
    finally:
        matrix /= scale
    return Spectrum(values / scale, left.T.contiguous(), rest / scale**2, shape).head(k)


def empty_spectrum(shape: tuple[int, int]) -> Spectrum:
    """The spectrum of a matrix of zeros: no values at all."""
    return Spectrum(torch.zeros(0).double(), torch.zeros(0, shape[0]).double(), 0.0, shape)


def _block_krylov(matrix: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Left vectors [m, width * (DEPTH + 1)] and singular values of `matrix` in its Krylov space; energy outside it."""
    rows, columns = matrix.shape
    width = max(1, min(width, min(rows, columns) // (DEPTH + 1)))
    generator = torch.Generator().manual_seed(seed)
    block = matrix @ torch.randn(columns, width, generator=generator)
    basis = torch.linalg.qr(block.double()).Q
    for _ in range(DEPTH):
        block = matrix @ (matrix.T @ basis[:, -width:].float())
        fresh = block.double()
        # Twice is enough (Kahan, Parlett): once leaves the rounding of what was removed.
        for _ in range(2):
            fresh = fresh - basis @ (basis.T @ fresh)
            fresh = torch.linalg.qr(fresh).Q
        basis = torch.cat([basis, fresh], dim=1)
    # Float64 by blocks of rows: the whole matrix in float64 would be two more copies of it.
    projection = torch.zeros(basis.shape[1], columns, dtype=torch.float64)
    for start in range(0, rows, BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        projection += basis[part].T @ matrix[part].double()
    inner, values, _ = torch.linalg.svd(projection, full_matrices=False)
    # Summed from the residual itself: a difference of energies would drown the rounding noise of float32 weights.
    rest = 0.0
    for start in range(0, rows, BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        rest += float((matrix[part].double() - basis[part] @ projection).square().sum())
    return basis @ inner, values, rest


def numerical_rank(spectrum: Spectrum, storage_edge: float) -> int:
    """How many of the leading directions say something about fine-tuning rather than about rounding.

    A value counts until the first one that is either

    - at most eps * max(shape) * largest value, eps that of float64 (the arithmetic's own noise), or
    - at most `storage_edge`, the largest singular value that rounding the weights to their storage dtype can explain,
      AND no larger than the edge of white noise with the energy that the remaining values have (Marchenko-Pastur, with
      Tracy-Widom fluctuations: Johnstone, Annals of Statistics 2001; the sequential test follows Kritchman and Nadler,
      2008).

    Below the edge a singular vector is independent of any planted one (Baik, Ben Arous, Peche 2005), so nothing is
    lost. Both halves of the second rule are needed: the first alone would drop small but structured deltas, the second
    alone would drop an update that is real and happens to be white. In doubt a direction stays: calibration can live
    with a useless direction, detection cannot live without a useful one.
    """
    values = [float(value) for value in spectrum.values]
    if not values:
        return 0
    floor = torch.finfo(torch.float64).eps * max(spectrum.shape) * values[0]
    # Tail sums from the small end, so that a large first value does not round the small ones away.
    tails = spectrum.values.square().flip(0).cumsum(0).flip(0) + spectrum.rest
    for rank, value in enumerate(values):
        if value <= floor:
            return rank
        edge = _white_noise_edge(float(tails[rank]), spectrum.shape[0] - rank, spectrum.shape[1] - rank)
        if value <= min(storage_edge, edge):
            return rank
    return len(values)


def _white_noise_edge(energy: float, rows: int, columns: int) -> float:
    """The largest singular value that white noise of this shape and total energy reaches in 999 of 1,000 draws."""
    variance = energy / (rows * columns)
    centre = (sqrt(rows) + sqrt(columns)) ** 2
    spread = (sqrt(rows) + sqrt(columns)) * (1.0 / sqrt(rows) + 1.0 / sqrt(columns)) ** (1.0 / 3.0)
    return sqrt(variance * (centre + TRACY_WIDOM_QUANTILE * spread))
