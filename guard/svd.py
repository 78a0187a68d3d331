"""The strongest left singular vectors of one matrix, and how many of them are more than rounding noise.

Full decompositions of a large model's matrices take minutes each and throw nearly everything away. `truncated_svd`
builds a randomised block Krylov space instead (Musco & Musco, "Randomized Block Krylov Methods", NeurIPS 2015), whose
accuracy does not depend on gaps between singular values: fine-tuned deltas often decay slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, sqrt

import torch

# Below this smaller side a full float64 decomposition takes well under a second and leaves nothing to approximate.
EXACT_SIDE = 256
OVERSAMPLING = 12
DEPTH = 4
BLOCK_ROWS = 64

# The Tracy-Widom law (beta = 1) exceeds this about once in a thousand draws.
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
    """The top min(k, shape) of `leading_svd`."""
    return leading_svd(matrix, k, seed).head(k)


def leading_svd(matrix: torch.Tensor, k: int, seed: int) -> Spectrum:
    """The leading singular values and left vectors of a finite float32 matrix [m, n]: k of them, and more that came
    along. Of a small matrix these are all, exactly; of a large one those beyond k are bounded from below.

    Scales `matrix` in place, by a power of two, and leaves it so: no copy of it is made. The large products run in
    float32, the projection and all orthogonalisation in float64, so singular values carry no float32 rounding of their
    own. Deterministic for a seed on one machine and number of threads.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    smallest, largest = (float(bound) for bound in torch.aminmax(matrix))
    peak = max(-smallest, largest)
    if not peak:
        return empty_spectrum(shape)
    # Products of tiny deltas would underflow, of huge ones overflow; the bound keeps the factor itself in float32.
    scale = 2.0 ** max(-120, min(120, -frexp(peak)[1]))
    matrix *= scale
    if min(shape) <= max(EXACT_SIDE, 2 * k):
        left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
        rest = 0.0
    else:
        left, values, rest = _block_krylov(matrix, k + OVERSAMPLING, seed)
    return Spectrum(values / scale, left.T.contiguous(), rest / scale**2, shape)


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
    # A delta of few rows fills its space early, and QR completes the blocks of zeros that follow with vectors that are
    # there already. Once more over all of them makes the basis orthonormal whatever happened.
    basis = torch.linalg.qr(basis).Q
    # Float64 by blocks of rows: the whole matrix in float64 would be two more copies of it.
    projection = torch.zeros(basis.shape[1], columns, dtype=torch.float64)
    for start in range(0, rows, BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        projection += basis[part].T @ matrix[part].double()
    # Summed from the residual itself: a difference of energies would drown the rounding noise of float32 weights.
    rest = 0.0
    for start in range(0, rows, BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        rest += float((matrix[part].double() - basis[part] @ projection).square_().sum())
    # The right side is not wanted: the triangle of its QR has the same left vectors and is small.
    triangle = torch.linalg.qr(projection.T, mode="r").R
    inner, values, _ = torch.linalg.svd(triangle.T)
    return basis @ inner, values, rest


@dataclass(frozen=True, slots=True)
class RoundingNoise:
    """What rounding weights to their storage dtype can leave in a delta, if its errors are independent.

    `edge`: the largest singular value that such errors reach; `energy`: their expected squared Frobenius norm.
    """

    edge: float
    energy: float

    @classmethod
    def of_variances(cls, rows: torch.Tensor, columns: torch.Tensor) -> RoundingNoise:
        """From the sums of the entries' variances over each row [m] and each column [n].

        The spectral norm of independent entries is close to, and hardly above, the largest row deviation plus the
        largest column deviation (Bandeira and van Handel, Annals of Probability 2016); the last bit is the
        Tracy-Widom fluctuation of that edge (Johnstone, Annals of Statistics 2001).
        """
        edge = sqrt(float(rows.max())) + sqrt(float(columns.max()))
        return cls(_fluctuating(edge, len(rows), len(columns)), float(rows.sum()))

    @classmethod
    def of_product(cls, norm: float, column: float, energy: float, shape: tuple[int, int]) -> RoundingNoise:
        """Of outer @ E, E [m, n] of independent entries in this `shape`, for a fixed matrix `outer`.

        `norm`: the largest singular value of outer @ diag(E's row deviations); `column`: the largest deviation of a
        column of the product; `energy`: the product's expected squared Frobenius norm. Chevet's inequality: the
        largest singular value of outer @ E is hardly above the sum of the two.
        """
        return cls(_fluctuating(norm + column, *shape), energy)

    def plus(self, other: RoundingNoise) -> RoundingNoise:
        """Of the sum of two independent errors."""
        return RoundingNoise(self.edge + other.edge, self.energy + other.energy)


def _fluctuating(edge: float, m: int, n: int) -> float:
    spread = (1.0 / sqrt(m) + 1.0 / sqrt(n)) ** (1.0 / 3.0) / (sqrt(m) + sqrt(n))
    return edge * sqrt(1.0 + TRACY_WIDOM_QUANTILE * spread)


def numerical_rank(spectrum: Spectrum, noise: RoundingNoise | None) -> int:
    """How many of the leading directions say something about fine-tuning rather than about rounding.

    A value counts until the first one that is either

    - at most eps * max(shape) * largest value, eps that of float64: noise of the arithmetic here; or
    - at most the edge of the storage's rounding noise, scaled down where the energy of this and all further values is
      less than that noise would have (a delta much smaller than its weights' precision mostly rounds away).

    The test is sequential, as in Kritchman and Nadler (2008). Below the edge a singular vector is independent of any
    planted one in the limit (Baik, Ben Arous and Peche, 2005), so little is lost. In doubt a direction stays:
    calibration can live with a useless direction, detection cannot live without a useful one.
    """
    if not len(spectrum.values):
        return 0
    floor = torch.finfo(torch.float64).eps * max(spectrum.shape) * float(spectrum.values[0])
    # Sums from the small end, so that a large first value does not round the small ones away.
    tails = spectrum.values.square().flip(0).cumsum(0).flip(0) + spectrum.rest
    for rank, (value, tail) in enumerate(zip(spectrum.values.tolist(), tails.tolist(), strict=True)):
        if value <= floor:
            return rank
        if noise is not None and noise.energy and value <= noise.edge * min(1.0, sqrt(tail / noise.energy)):
            return rank
    return len(spectrum.values)
