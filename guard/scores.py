"""How far a token stands from clean, in bank space.

For token t and watched layer l the cosines c = U_l h / |h| of the residual stream h after layer l with the bank's
directions U_l are the token's coordinates in *bank space*; coordinates of all watched layers stand side by side. Two
detectors read them, behind one interface:

- `Exceedance`, at every token: max over coordinates of max(c - high, low - c), WeightWatch's rule (arXiv 2508.00161,
  section 3) without its threshold. Positive means outside the range of clean traffic.
- `Density`, at decision positions (rows whose logits are sampled): per layer the distance to the k-th nearest clean
  reference, over what is usual among references there; root mean square over the layers. See
  docs/decisions/0003-density.md.

These plain-torch functions are the reference that any faster kernel is held against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from guard.bank import Bank
from guard.verdict import DetectorName

NEAREST = 3
"""The density score never looks at a nearer reference than the third, so that one stray one does not make a hole."""
SHARE = 300
"""One in so many references is nearer than the one looked at: with more references the estimate gets steadier, not
finer. Chosen by measurement on two organisms, see docs/decisions/0003-density.md."""

SHORTEST = 1e-15
"""Below this length the squares that make it are rounded to float32's smallest numbers."""


@dataclass(frozen=True, slots=True)
class BankSpace:
    """Which coordinate belongs to which layer and direction."""

    layers: tuple[int, ...]
    """Watched decoder layers, ascending."""
    widths: tuple[int, ...]
    """Directions per watched layer."""
    names: tuple[str, ...]
    """One name per coordinate, such as `L3.o_proj.u0`."""

    @classmethod
    def of(cls, bank: Bank) -> BankSpace:
        return cls(
            tuple(layer.index for layer in bank.layers),
            tuple(len(layer.names) for layer in bank.layers),
            tuple(name for layer in bank.layers for name in layer.names),
        )

    @property
    def size(self) -> int:
        return sum(self.widths)

    def split(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Coordinates [T, size] to one [T, width] per layer."""
        return torch.split(coordinates, list(self.widths), dim=-1)

    def layer_slot(self) -> torch.Tensor:
        """int64 [size]: for each coordinate the index into `layers`."""
        return torch.repeat_interleave(torch.arange(len(self.layers)), torch.tensor(self.widths))


def cosines(residual: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Cosine of every residual row with every direction.

    Args:
        residual: [T, H], any float dtype; computed in float32.
        directions: [K, H] float32, unit rows.

    Returns:
        [T, K] float32. A row of zeros, or one with NaN or infinity, gives NaN: it cannot be scored. So does one whose
        length float32 cannot hold; its cosines would come out as zeros, which is what clean looks like.
    """
    rows = residual.float()
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    measured = (lengths > SHORTEST) & lengths.isfinite()
    return (rows @ directions.T) / lengths.where(measured, torch.nan)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One detector's scores of T tokens."""

    values: torch.Tensor
    """float32 [T]."""
    layer_slots: torch.Tensor
    """int64 [T], index into `BankSpace.layers` of the layer that contributed most."""
    coordinates: torch.Tensor
    """int64 [T], the coordinate that contributed most; -1 where no single one did."""


class Detector(Protocol):
    """Scores tokens against what clean traffic looked like. Phases: 0 prompt, 1 completion."""

    name: DetectorName
    every_token: bool
    """True: scores every token. False: scores decision positions only."""

    def score(self, coordinates: torch.Tensor, phases: torch.Tensor) -> TokenScores:
        """Coordinates float32 [T, size] and phases int64 [T] to scores."""
        ...


class Exceedance:
    """The paper's rule without its threshold: how far the worst coordinate lies outside its clean range."""

    name: DetectorName = "exceedance"
    every_token = True

    def __init__(self, space: BankSpace, low: torch.Tensor, high: torch.Tensor) -> None:
        """`low`, `high`: float32 [2, size], the clean range per phase."""
        self._low, self._high = low, high
        self._layer_slot = space.layer_slot()

    def score(self, coordinates: torch.Tensor, phases: torch.Tensor) -> TokenScores:
        outside = torch.maximum(coordinates - self._high[phases], self._low[phases] - coordinates)
        values, worst = outside.max(dim=-1)
        return TokenScores(values, self._layer_slot[worst], worst)


class Density:
    """Distance to the nearest clean references in bank space, per layer, in units of what is usual there."""

    name: DetectorName = "density"
    every_token = False

    def __init__(
        self,
        space: BankSpace,
        references: tuple[torch.Tensor, torch.Tensor],
        scales: torch.Tensor,
        nearest: int | None = None,
    ) -> None:
        """`references`: per phase float32 [N, size], N >= nearest. `scales`: float32 [2, layers], positive.
        `nearest`: which neighbour; None takes `neighbour(N)`."""
        self._references = tuple(space.split(phase) for phase in references)
        self._scales = scales
        self._nearest = tuple(nearest or neighbour(len(phase)) for phase in references)

    def score(self, coordinates: torch.Tensor, phases: torch.Tensor) -> TokenScores:
        values = torch.empty(len(coordinates), dtype=torch.float32)
        slots = torch.zeros(len(coordinates), dtype=torch.int64)
        for phase in sorted(set(phases.tolist())):
            rows = (phases == phase).nonzero().squeeze(-1)
            distances = _nearest_distances(coordinates[rows], self._references[phase], self._nearest[phase])
            ratios = distances / self._scales[phase]
            values[rows] = ratios.square().mean(dim=-1).sqrt()
            slots[rows] = ratios.argmax(dim=-1)
        return TokenScores(values, slots, torch.full_like(slots, -1))


def _nearest_distances(coordinates: torch.Tensor, references: tuple[torch.Tensor, ...], nearest: int) -> torch.Tensor:
    """Per layer the distance from each row to its `nearest`-th reference: float32 [T, layers]."""
    widths = [layer.shape[-1] for layer in references]
    columns = []
    for rows, layer in zip(torch.split(coordinates, widths, dim=-1), references, strict=True):
        distances = torch.cdist(rows, layer, compute_mode="donot_use_mm_for_euclid_dist")
        # The largest of the `nearest` smallest is kthvalue's value, which takes longer to find on a CPU.
        columns.append(distances.topk(nearest, dim=-1, largest=False, sorted=False).values.amax(dim=-1))
    return torch.stack(columns, dim=-1)


def neighbour(references: int) -> int:
    """Which neighbour's distance is the density score among this many references."""
    return max(NEAREST, -(-references // SHARE))


def density_scales(space: BankSpace, references: torch.Tensor, nearest: int | None = None) -> torch.Tensor:
    """What distance is usual among clean references: per layer the median distance of a reference to its
    `nearest`-th other reference (None: `neighbour(N)`-th). float32 [layers], positive."""
    nearest = nearest or neighbour(len(references))
    split = space.split(references)
    # Each reference is its own nearest neighbour, at distance 0.
    distances = torch.cat([_nearest_distances(rows, split, nearest + 1) for rows in torch.split(references, 1024)])
    return distances.median(dim=0).values.clamp_min(1e-6)
