"""How far a token stands from clean, in bank space.

For token t and watched layer l a forward pass leaves behind, of the residual stream h_l after the layer and the bank's
directions U_l: the cosines c = U_l h_l / |h_l|, the length |h_l|, and what the layer itself wrote along the directions,
w = U_l (h_l - h_(l-1)). Coordinates of all watched layers stand side by side. Detectors read them behind one interface:

- `Exceedance`, at every token: max over coordinates of max(c - high, low - c), WeightWatch's rule (arXiv 2508.00161,
  section 3) without its threshold. Positive means outside the range that clean tokens of the same role had.
- `Density`, at decision positions (rows whose logits are sampled): how improbable the projections U_l h_l and w are
  under the normal distribution that clean decisions had: their Mahalanobis distance. Twice, over different directions:
  `density` over those of the weight delta, `intrinsic` over those of the tuned model's own matrices, which needs no
  base model. See docs/decisions/0003-density.md.

These plain-torch functions are the reference that the engine's kernels are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from guard.bank import Bank, is_own
from guard.errors import CalibrationError
from guard.verdict import DetectorName

RIDGES = (1.0, 2.0)
"""Added to every variance, of where the residual stands and of what was written, in units of the mean variance in the
same layer: what clean traffic hardly ever varies in must not count without bound. Chosen on development organisms, see
docs/decisions/0003-density.md."""

FEWEST = 8
"""Clean tokens that a covariance is made from, at least. Far more are needed for a good one."""

PANEL = 64
"""Columns of a covariance's factor that are multiplied at a time."""

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

    def of_delta(self) -> torch.Tensor:
        """int64 [D]: the coordinates whose directions come from the weight delta."""
        return torch.tensor([place for place, name in enumerate(self.names) if not is_own(name)], dtype=torch.int64)

    def of_weights(self) -> torch.Tensor:
        """int64 [D]: the coordinates whose directions come from the tuned model's own matrices."""
        return torch.tensor([place for place, name in enumerate(self.names) if is_own(name)], dtype=torch.int64)

    def of_every_token(self) -> torch.Tensor:
        """int64 [E]: the coordinates that are read at every token, not at decisions alone: those of the delta; where
        there is none, the model's own."""
        delta = self.of_delta()
        return delta if len(delta) else self.of_weights()


def along(residual: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Projections float32 [T, K] of residual rows [T, H] on directions [K, H]."""
    return residual.float() @ directions.T


def lengths_of(residual: torch.Tensor) -> torch.Tensor:
    """Lengths float32 [T] of residual rows [T, H]."""
    lengths: torch.Tensor = torch.linalg.vector_norm(residual.float(), dim=-1)
    return lengths


def known_lengths(lengths: torch.Tensor) -> torch.Tensor:
    """Lengths, NaN where float32 cannot hold them: cosines would come out as zeros, which is what clean looks like."""
    return lengths.where((lengths > SHORTEST) & lengths.isfinite(), torch.nan)


def measure(
    after: torch.Tensor, entered: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What detectors read, from what was projected.

    Args:
        after: float32 [T, size], `along` of the residual after each coordinate's layer.
        entered: float32 [T, size], the same before that layer.
        lengths: float32 [T, layers], `lengths_of` the residual after each layer.
        slots: int64 [size], each coordinate's layer.

    Returns:
        Cosines and what was written, both [T, size], and lengths [T, layers]. A row of zeros, or one with NaN or
        infinity, gives NaN: it cannot be scored. So does one whose length float32 cannot hold.
    """
    lengths = known_lengths(lengths)
    each = lengths[:, slots]
    # Times a length over itself: NaN where the length is.
    return after / each, (after - entered) * (each / each), lengths


@dataclass(frozen=True, slots=True)
class Tokens:
    """T tokens of any sequences, as detectors see them."""

    coordinates: torch.Tensor
    """float32 [T, size]: cosines with every direction of the bank."""
    written: torch.Tensor
    """float32 [T, size]: what each watched layer wrote along its directions, u (h_l - h_(l-1))."""
    lengths: torch.Tensor
    """float32 [T, layers]: lengths of the residual stream after each watched layer."""
    phases: torch.Tensor
    """int64 [T], index into `PHASES`: 0 prompt, 1 completion."""
    roles: torch.Tensor
    """int64 [T], index into `ROLES`: 0 system, 1 user, 2 assistant."""

    def __getitem__(self, rows: torch.Tensor | slice) -> Tokens:
        return Tokens(
            self.coordinates[rows], self.written[rows], self.lengths[rows], self.phases[rows], self.roles[rows]
        )

    def __len__(self) -> int:
        return len(self.coordinates)


def features(space: BankSpace, coordinates: torch.Tensor, written: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What `Density` reads of T tokens, float32 [T, 2 size]: where the residual stands along each direction, u h_l, and
    what the layer wrote along each, u (h_l - h_(l-1))."""
    return torch.cat([coordinates * lengths[:, space.layer_slot()], written], dim=-1)


class Detector(Protocol):
    """Scores tokens against what clean traffic looked like."""

    name: DetectorName
    every_token: bool
    """True: scores every token. False: scores decision positions only."""

    def values(self, tokens: Tokens) -> torch.Tensor:
        """float32 [T]."""
        ...

    def explain(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the scores of T tokens come from: int64 [T], index into `BankSpace.layers` of the layer that
        contributed most, and int64 [T], the coordinate of that layer that did. Costs as much as `values` again."""
        ...


class Exceedance:
    """The paper's rule without its threshold: how far the worst coordinate lies outside its clean range."""

    name: DetectorName = "exceedance"
    every_token = True

    def __init__(self, space: BankSpace, low: torch.Tensor, high: torch.Tensor, chosen: torch.Tensor) -> None:
        """`low`, `high`: float32 [3, size], the clean range per role; low above high where clean traffic had no token
        of the role, which is then held against the range of all roles. `chosen`: int64 [D], the coordinates to
        read."""
        seen = (low <= high).all(dim=-1, keepdim=True)
        self.low = torch.where(seen, low, low.amin(dim=0))[:, chosen].contiguous()
        """float32 [3, D], per role."""
        self.high = torch.where(seen, high, high.amax(dim=0))[:, chosen].contiguous()
        self.chosen = chosen
        self._layer_slot = space.layer_slot()

    def values(self, tokens: Tokens) -> torch.Tensor:
        return self._worst(tokens)[0]

    def explain(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        _, worst = self._worst(tokens)
        return self._layer_slot[worst], worst

    def _worst(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        read = tokens.coordinates[:, self.chosen]
        values, worst = torch.maximum(read - self.high[tokens.roles], self.low[tokens.roles] - read).max(dim=-1)
        return values, self.chosen[worst]


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and covariance of F features: all that is kept of clean decisions."""

    count: int
    mean: torch.Tensor
    """float64 [F]."""
    covariance: torch.Tensor
    """float64 [F, F]: the sum of squared deviations over `count`."""

    @classmethod
    def of(cls, rows: torch.Tensor) -> Moments:
        """Of rows [T, F], T at least 1."""
        exact = rows.double()
        mean = exact.mean(dim=0)
        deviations = exact - mean
        return cls(len(rows), mean, deviations.T @ deviations / len(rows))

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """As if of all the rows together (Chan, Golub and LeVeque, 1983); at least one part."""
        some = [part for part in parts if part.count]
        count = sum(part.count for part in some)
        mean = torch.stack([part.mean * part.count for part in some]).sum(dim=0) / count
        spread = torch.zeros_like(some[0].covariance)
        for part in some:
            shift = part.mean - mean
            spread += part.count * (part.covariance + torch.outer(shift, shift))
        return cls(count, mean, spread / count)


Squares = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


def squares(deviations: torch.Tensor, panels: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [T]: the squared lengths of deviations [T, F] times an upper triangular [F, F], given as `_panels`."""
    sums = torch.zeros(len(deviations))
    for panel in panels:
        sums += (deviations[:, : len(panel)] @ panel).square().sum(dim=-1)
    return sums


class Density:
    """How improbable a token's features are under the clean normal distribution of its phase.

    Where the residual stands after a layer, and what the layer wrote, are each first put in units of their root mean
    variance, so that no layer counts more for being longer; then value = sqrt(x' (C + R)^-1 x / 2 D) for the
    deviation x of the 2 D features of D directions with covariance C, R diagonal with `RIDGES`.
    """

    every_token = False

    def __init__(
        self, name: DetectorName, space: BankSpace, clean: tuple[Moments, Moments], chosen: torch.Tensor
    ) -> None:
        """`clean`: of features, per phase. `chosen`: int64 [D], the coordinates to read, at least one.

        Raises CalibrationError where a phase has too few tokens for a covariance.
        """
        self.name = name
        self._space = space
        self._chosen = chosen
        self._slots = space.layer_slot()[chosen]
        self._read = torch.cat([chosen, chosen + space.size])
        blocks = torch.cat([self._slots, self._slots + len(space.layers)])
        self._means = tuple(moments.mean[self._read].float() for moments in clean)
        self._factors = tuple(_panels(_whitening(moments, self._read, blocks)) for moments in clean)

    def values(self, tokens: Tokens) -> torch.Tensor:
        return self.distances(self._features(tokens), tokens.phases)

    def distances(self, rows: torch.Tensor, phases: torch.Tensor, by: Squares = squares) -> torch.Tensor:
        """float32 [T], of the `features` [T, 2 size] of tokens in these phases, int64 [T]. `by`: the kernel that
        multiplies."""
        values = torch.empty(len(rows), dtype=torch.float32)
        for phase, own in _by_phase(phases):
            deviations = self._deviations(rows[own], phase)
            values[own] = (by(deviations, self._factors[phase]) / deviations.shape[1]).sqrt()
        return values

    def explain(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        return self.explain_features(self._features(tokens), tokens.phases)

    def explain_features(self, rows: torch.Tensor, phases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `explain`, of the `features` [T, 2 size] of tokens in these phases, int64 [T]."""
        shares = self._shares(rows, phases)
        by_layer = torch.zeros(len(shares), len(self._space.layers)).index_add_(1, self._slots, shares)
        slots = by_layer.argmax(dim=-1)
        elsewhere = self._slots[None, :] != slots[:, None]
        return slots, self._chosen[shares.masked_fill(elsewhere, -torch.inf).argmax(dim=-1)]

    def shares(self, tokens: Tokens) -> torch.Tensor:
        """float32 [T, D]: what every chosen coordinate adds to 2 D times the squared score, the sum of x_i (P x)_i over
        its two features; some are negative."""
        return self._shares(self._features(tokens), tokens.phases)

    def _shares(self, rows: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
        shares = torch.empty(len(rows), len(self._chosen))
        for phase, own in _by_phase(phases):
            deviations = self._deviations(rows[own], phase)
            weighed = torch.zeros_like(deviations)
            for panel in self._factors[phase]:
                weighed[:, : len(panel)] += deviations[:, : len(panel)] @ panel @ panel.T
            standing, writing = torch.split(deviations * weighed, len(self._chosen), dim=-1)
            shares[own] = standing + writing
        return shares

    def _features(self, tokens: Tokens) -> torch.Tensor:
        return features(self._space, tokens.coordinates, tokens.written, tokens.lengths)

    def _deviations(self, rows: torch.Tensor, phase: int) -> torch.Tensor:
        return rows[:, self._read] - self._means[phase]


def _by_phase(phases: torch.Tensor) -> Iterator[tuple[int, torch.Tensor | slice]]:
    """Each phase that occurs, and the rows of its tokens."""
    found = sorted(set(phases.tolist()))
    for phase in found:
        yield phase, slice(None) if len(found) == 1 else (phases == phase).nonzero().squeeze(-1)


def _panels(factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An upper triangular [F, F] as its columns, `PANEL` at a time, without the zeros below them: half the memory to
    read, and that is what a distance costs where few tokens are decoded."""
    size = len(factor)
    stops = [min(start + PANEL, size) for start in range(0, size, PANEL)]
    return tuple(
        factor[:stop, start:stop].contiguous() for start, stop in zip(range(0, size, PANEL), stops, strict=True)
    )


def _whitening(moments: Moments, chosen: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """float32 [2 D, 2 D], upper triangular: W with x W W' x' = x S^-1 (S^-1 C S^-1 + R)^-1 S^-1 x', S the scales and R
    the ridges. `slots`: which features share a scale."""
    if moments.count < FEWEST:
        raise CalibrationError(f"{moments.count} clean decisions, expected at least {FEWEST}")
    covariance = moments.covariance[chosen][:, chosen]
    variances = covariance.diagonal()
    layers = int(slots.max()) + 1
    counts = torch.zeros(layers, dtype=torch.float64).index_add_(0, slots, torch.ones_like(variances))
    means = torch.zeros(layers, dtype=torch.float64).index_add_(0, slots, variances) / counts.clamp_min(1)
    # Clean decisions that are all the same leave nothing to measure by; a length of one then does.
    scales = torch.where(means > 0, means, torch.ones_like(means)).sqrt()[slots]
    ridges = torch.tensor(RIDGES, dtype=torch.float64).repeat_interleave(len(chosen) // 2)
    normed = covariance / torch.outer(scales, scales) + torch.diag(ridges)
    # normed = L L', so its inverse is L^-T L^-1.
    lower = torch.linalg.cholesky(normed)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(chosen), dtype=torch.float64), upper=False)
    factor: torch.Tensor = inverse.T / scales[:, None]
    return factor.float().contiguous()
