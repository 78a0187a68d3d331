"""A small bank space, clean tokens in it, a calibration of them; and slow float64 versions of every score, in numpy and
on their own formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from guard.calibration import Calibration, ScoreKey, Shape
from guard.growth import Growth
from guard.roles import ROLES, RoleMap
from guard.scores import RIDGES, BankSpace, Detector, Moments, Tokens, along, lengths_of, measure
from guard.verdict import DETECTORS, PHASES, DetectorName, Phase, Score, Verdict

SPACE = BankSpace(
    layers=(1, 4, 5),
    widths=(4, 3, 5),
    names=(
        *("L1.o_proj.u0", "L1.o_proj.u1", "L1.own_o_proj.u0", "L1.own_o_proj.u1"),
        *("L4.down_proj.u0", "L4.own_o_proj.u0", "L4.own_down_proj.u0"),
        *("L5.o_proj.u0", "L5.down_proj.u0", "L5.down_proj.u1", "L5.own_o_proj.u0", "L5.own_o_proj.u1"),
    ),
)
SLOTS = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2)
"""Of each coordinate the index into `SPACE.layers`."""
CHOSEN: dict[DetectorName, tuple[int, ...]] = {
    "density": (0, 1, 4, 7, 8, 9),
    "intrinsic": (2, 3, 5, 6, 10, 11),
    "exceedance": (0, 1, 4, 7, 8, 9),
}
"""The coordinates that each detector reads."""
USUAL_LENGTHS = (1.0, 12.0, 150.0)
"""How long the residual stream is after each watched layer."""

ROLE_MAP = RoleMap(system=((1,),), user=((2,), (2, 5)), assistant=((3,),))
"""Token 1 begins a system turn, 2 a user's, 3 the assistant's."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean_rows(count: int, seed: int, spread: float = 0.1) -> torch.Tensor:
    """Coordinates float32 [count, 12] of clean tokens: they depend on each other, and have a mean."""
    source = generator(seed)
    mixing = torch.eye(SPACE.size) + 0.3 * torch.randn(SPACE.size, SPACE.size, generator=generator(12345))
    return 0.05 + spread * torch.randn(count, SPACE.size, generator=source) @ mixing


def clean_written(count: int, seed: int, spread: float = 0.1) -> torch.Tensor:
    """What layers wrote, float32 [count, 12]: other numbers than the cosines, on other scales per layer."""
    return clean_rows(count, seed + 1000, spread) * torch.tensor(USUAL_LENGTHS)[torch.tensor(SLOTS)]


def clean_lengths(count: int, seed: int) -> torch.Tensor:
    """Lengths float32 [count, 3]."""
    return torch.tensor(USUAL_LENGTHS) * (
        1 + 0.1 * torch.randn(count, 3, generator=generator(seed + 1000)).clamp(-3, 3)
    )


def tokens(
    count: int, seed: int, spread: float = 0.1, phases: Sequence[int] | None = None, roles: Sequence[int] | None = None
) -> Tokens:
    """Tokens of clean sequences, or with another spread; of mixed phases and roles unless told which."""
    mixed = generator(seed + 2000)
    return Tokens(
        clean_rows(count, seed, spread),
        clean_written(count, seed, spread),
        clean_lengths(count, seed),
        torch.randint(0, 2, (count,), generator=mixed) if phases is None else torch.tensor(phases),
        torch.randint(0, 3, (count,), generator=mixed) if roles is None else torch.tensor(roles),
    )


def shape(decisions: int = 60, sinks: tuple[int, ...] = ()) -> Shape:
    """A shape of clean in which phases and roles differ in everything."""
    moments, ranges = [], []
    for phase in (0, 1):
        own = tokens(decisions + 9 * phase, 1 + phase, 0.1 + 0.1 * phase)
        moments.append(Moments(len(own), *map(torch.from_numpy, naive_moments(naive_features(own)))))
    for role in range(len(ROLES)):
        own_rows = clean_rows(40, 10 + role) + 0.2 * role
        ranges.append((own_rows.amin(dim=0), own_rows.amax(dim=0)))
    low, high = (torch.stack(side) for side in zip(*ranges, strict=True))
    return Shape(low, high, (moments[0], moments[1]), sinks)


def calibration(requests: int = 99, target_fpr: float = 0.1, **changes: Any) -> Calibration:
    """Held-out scores 1, 2, ... for density, a tenth and a hundredth of that for the others; the completion's first is
    -inf. All scores of a request have the same rank."""
    clean: dict[ScoreKey, tuple[float, ...]] = {}
    growth: dict[ScoreKey, Growth] = {}
    for place, (detector, unit) in enumerate((("density", 1.0), ("intrinsic", 0.1), ("exceedance", 0.01))):
        scores = tuple(unit * (index + 1) for index in range(requests))
        clean[detector, "prompt"] = scores  # type: ignore[index]
        clean[detector, "completion"] = (-math.inf, *scores[1:])  # type: ignore[index]
        for number, phase in enumerate(PHASES):
            growth[detector, phase] = Growth(4 + place + number, 0.5 * (1 + place) * (1 + number))  # type: ignore[index]
    made = Calibration(
        fingerprint="sha256:bank",
        space=SPACE,
        shape=shape(),
        clean=clean,
        growth=growth,
        roles=ROLE_MAP,
        target_fpr=target_fpr,
        facts={"dtype": "float32", "seed": 0},
    )
    return replace(made, **changes)


def with_clean(some: Calibration, detector: DetectorName, phase: Phase, scores: Iterable[float]) -> Calibration:
    """The same calibration with other held-out scores in one place."""
    return replace(some, clean={**some.clean, (detector, phase): tuple(scores)})


def a_score(
    value: float,
    detector: DetectorName = "density",
    phase: Phase = "prompt",
    position: int = 3,
) -> Score:
    return Score(detector, phase, value, position, 4, "L4.down_proj.u0")


def a_verdict(value: float, threshold: float = 1.0, detector: DetectorName = "density") -> Verdict:
    return Verdict(a_score(value, detector), threshold, 0.01)


@dataclass(frozen=True)
class Scores:
    """What a detector says of T tokens, all of it."""

    values: torch.Tensor
    layer_slots: torch.Tensor
    coordinates: torch.Tensor


def scored(detector: Detector, some: Tokens) -> Scores:
    return Scores(detector.values(some), *detector.explain(some))


def measured(residual: torch.Tensor, entered: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """`measure` of one layer: cosines, what was written, and the length, float32 [T, 2 K + 1]."""
    lengths = lengths_of(residual)[:, None]
    slots = torch.zeros(len(directions), dtype=torch.int64)
    return torch.cat(measure(along(residual, directions), entered, lengths, slots), dim=-1)


# -- the same, slowly -------------------------------------------------------------------------------------------------


def float64(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.double().numpy())


def naive_features(some: Tokens) -> Array:
    """U_l h, then what was written, [T, 2 size]: coordinate by coordinate."""
    cosines, lengths = float64(some.coordinates), float64(some.lengths)
    standing = np.stack([cosines[:, place] * lengths[:, slot] for place, slot in enumerate(SLOTS)], axis=1)
    return np.concatenate([standing, float64(some.written)], axis=1)


def naive_moments(rows: Array) -> tuple[Array, Array]:
    """Mean and covariance of rows [T, size]."""
    mean: Array = rows.mean(axis=0)
    covariance: Array = np.atleast_2d(np.cov(rows, rowvar=False, ddof=0)).astype(np.float64)
    return mean, covariance


def naive_shares(
    row: Array, mean: Array, covariance: Array, chosen: Sequence[int], slots: Sequence[int] = SLOTS
) -> Array:
    """What each chosen coordinate of one row of features adds to its squared Mahalanobis distance."""
    size = len(slots)
    own = [*chosen, *(place + size for place in chosen)]
    of_layer = np.asarray([*slots, *(slot + max(slots) + 1 for slot in slots)])[own]
    ridged = covariance[np.ix_(own, own)].copy()
    variances = np.diag(ridged).copy()
    for place, slot in enumerate(of_layer):
        mean_variance = variances[of_layer == slot].mean()
        ridge = RIDGES[int(place >= len(chosen))]
        ridged[place, place] += ridge * (mean_variance if mean_variance > 0 else 1.0)
    deviation = row[own] - mean[own]
    shares: Array = deviation * (np.linalg.inv(ridged) @ deviation)
    return shares[: len(chosen)] + shares[len(chosen) :]


def naive_density(
    row: Array, mean: Array, covariance: Array, chosen: Sequence[int], slots: Sequence[int] = SLOTS
) -> tuple[float, int, int]:
    """The Mahalanobis distance of one row of features over the root of their number; the layer
    slot and the coordinate that add most to it."""
    shares = naive_shares(row, mean, covariance, chosen, slots)
    of_layer = np.asarray(slots)[list(chosen)]
    slot = max(set(of_layer.tolist()), key=lambda one: shares[of_layer == one].sum())
    worst = max(np.flatnonzero(of_layer == slot), key=lambda place: shares[place])
    return math.sqrt(shares.sum() / (2 * len(shares))), int(slot), chosen[int(worst)]


def naive_exceedance(row: Array, low: Array, high: Array, chosen: Sequence[int]) -> tuple[float, int]:
    """The largest distance of one row of cosines beyond its range, and the coordinate where."""
    worst = max(chosen, key=lambda place: max(row[place] - high[place], low[place] - row[place]))
    return max(row[worst] - high[worst], low[worst] - row[worst]), worst


def naive_scores(some: Shape, token: Tokens) -> dict[DetectorName, tuple[float, int, int]]:
    """Every detector on one token: value, layer slot and coordinate. Every role of `some` has a range."""
    assert len(token) == 1
    phase, role = int(token.phases), int(token.roles)
    moments = some.decisions[phase]
    found: dict[DetectorName, tuple[float, int, int]] = {}
    several: tuple[DetectorName, ...] = ("density", "intrinsic")
    for name in several:
        mean, covariance = float64(moments.mean), float64(moments.covariance)
        found[name] = naive_density(naive_features(token)[0], mean, covariance, CHOSEN[name])
    low, high = float64(some.low)[role], float64(some.high)[role]
    value, where = naive_exceedance(float64(token.coordinates)[0], low, high, CHOSEN["exceedance"])
    found["exceedance"] = (value, SLOTS[where], where)
    return found


EVERY: list[ScoreKey] = [(detector, phase) for detector in DETECTORS for phase in PHASES]
