"""How much two sets of directions are the same, by the principal angles between their spans. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rows whose part outside of the others is shorter than this add nothing to the span.
DEPENDENT = 1e-4


@dataclass(frozen=True, slots=True)
class Overlap:
    """Squared cosines of the principal angles between two subspaces.

    `largest`: 1.0 when they share a direction, 0.0 when they are orthogonal. `mean`: the share of the smaller one that
    lies in the other. `chance`: the mean for random subspaces of these sizes.
    """

    largest: float
    mean: float
    chance: float


def overlap(first: NDArray[np.float32], second: NDArray[np.float32]) -> Overlap:
    """Of the spans of the rows of two matrices [K, hidden]; each holds one row at least."""
    one, other = _basis(first), _basis(second)
    squares = np.linalg.svd(one @ other.T, compute_uv=False) ** 2
    smaller, larger = sorted((len(one), len(other)))
    return Overlap(
        largest=min(1.0, float(squares.max())),
        mean=min(1.0, float(squares.sum()) / smaller),
        chance=min(1.0, larger / first.shape[1]),
    )


def _basis(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    _, values, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    return np.asarray(basis[values > DEPENDENT * values[0]], dtype=np.float64)
