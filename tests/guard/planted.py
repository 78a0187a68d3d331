"""A small bank space, clean coordinates in it, a calibration of them; and slow float64 versions of every score."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from guard.calibration import Calibration, Shape
from guard.scores import NEAREST, BankSpace
from guard.verdict import DETECTORS, PHASES, DetectorName, Phase, Score, Verdict

SPACE = BankSpace(layers=(1, 4, 5), widths=(3, 2, 4), names=tuple(f"d{index}" for index in range(9)))
SLOTS = (0, 0, 0, 1, 1, 2, 2, 2, 2)
"""Of each coordinate the index into `SPACE.layers`."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean_rows(count: int, seed: int, spread: float = 0.1) -> torch.Tensor:
    """Coordinates float32 [count, 9] of clean tokens."""
    return spread * torch.randn(count, SPACE.size, generator=generator(seed))


def shape(references: int = 40) -> Shape:
    """A shape of clean in which the two phases differ in everything."""
    prompt, completion = clean_rows(references, 1), 0.3 + 2 * clean_rows(references + 7, 2)
    low = torch.stack([prompt.min(dim=0).values, completion.min(dim=0).values])
    high = torch.stack([prompt.max(dim=0).values, completion.max(dim=0).values])
    return Shape.fit(SPACE, low, high, (prompt, completion))


def calibration(requests: int = 99, target_fpr: float = 0.1) -> Calibration:
    """Held-out scores 1, 2, ... for density and 0.01, 0.02, ... for exceedance; the completion's first is -inf."""
    clean: dict[tuple[DetectorName, Phase], tuple[float, ...]] = {}
    for detector, unit in (("density", 1.0), ("exceedance", 0.01)):
        scores = tuple(unit * (index + 1) for index in range(requests))
        clean[detector, "prompt"] = scores  # type: ignore[index]
        clean[detector, "completion"] = (-math.inf, *scores[1:])  # type: ignore[index]
    return Calibration("sha256:bank", SPACE, shape(), clean, target_fpr, {"dtype": "float32", "seed": 0})


def with_clean(some: Calibration, detector: DetectorName, phase: Phase, scores: Iterable[float]) -> Calibration:
    """The same calibration with other held-out scores in one place."""
    return replace(some, clean={**some.clean, (detector, phase): tuple(scores)})


def a_score(
    value: float,
    detector: DetectorName = "density",
    phase: Phase = "prompt",
    position: int = 3,
) -> Score:
    return Score(detector, phase, value, position, 4, "d3" if detector == "exceedance" else None)


def a_verdict(value: float, threshold: float = 1.0, detector: DetectorName = "density") -> Verdict:
    return Verdict(a_score(value, detector), threshold, 0.01)


def naive_exceedance(row: Array, low: Array, high: Array) -> tuple[float, int]:
    """The largest distance of one row [size] beyond its range, and the coordinate where."""
    worst = [max(value - high[index], low[index] - value) for index, value in enumerate(row)]
    return max(worst), int(np.argmax(worst))


def naive_nearest(row: Array, references: Array, nearest: int = NEAREST) -> list[float]:
    """Per layer the distance of one row [size] to its `nearest`-th reference of [N, size]."""
    distances, first = [], 0
    for width in SPACE.widths:
        part = slice(first, first + width)
        distances.append(sorted(math.dist(row[part], other[part]) for other in references)[nearest - 1])
        first += width
    return distances


def naive_density(row: Array, references: Array, scales: Array, nearest: int = NEAREST) -> tuple[float, int]:
    """The root mean square over layers of distance over scale, and the layer slot where that is largest."""
    ratios = [distance / scale for distance, scale in zip(naive_nearest(row, references, nearest), scales, strict=True)]
    return math.sqrt(sum(ratio * ratio for ratio in ratios) / len(ratios)), int(np.argmax(ratios))


def float64(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.double().numpy())


def naive_scores(some: Shape, row: torch.Tensor, phase: int) -> dict[DetectorName, tuple[float, int]]:
    """Both detectors on one row: value, and coordinate or layer slot."""
    exact = float64(row)
    return {
        "exceedance": naive_exceedance(exact, float64(some.low[phase]), float64(some.high[phase])),
        "density": naive_density(exact, float64(some.references[phase]), float64(some.scales[phase])),
    }


EVERY = [(detector, phase) for detector in DETECTORS for phase in PHASES]
