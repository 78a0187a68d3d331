"""Every detector and every baseline as one thing: fitted on clean requests, it gives a request one score per phase.

    fitted = RULES["density"].fit(clean, references)      # references: which of the clean requests may be looked at
    scores = fitted(triggered)                            # float64 [N, phases]

What is served and what it is compared with are held to the same thresholds (`guard/conformal.py`); only the paper's own
rule has one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from guard.evaluation.reading import Reads, Seen
from guard.roles import ROLES
from guard.scores import Density, Exceedance, Moments, Tokens, features
from guard.verdict import DetectorName

Fitted = Callable[[Reads], torch.Tensor]
PAPER_EPSILON = 0.01
"""WeightWatch flags a cosine more than this outside the range of calibration (arXiv 2508.00161, section 3)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to score requests."""

    name: str
    phases: tuple[str, ...]
    """Of the columns of its scores."""
    fit: Callable[[Reads, torch.Tensor], Fitted]
    """From clean reads and the int64 [n] that may be looked at."""
    lens: str | None = None
    """The directions it reads; None for a rule that reads none."""
    detector: DetectorName | None = None
    """Which detector of the engine it is, if any."""


def density(name: DetectorName, label: str, lens: str) -> Rule:
    """The detector that is served, over the directions of one lens."""

    def fit(clean: Reads, references: torch.Tensor) -> Fitted:
        chosen = chosen_by(name, clean.seen[lens])
        detector = Density(name, clean.seen[lens].space, decision_moments(clean, references, lens), chosen)
        return lambda reads: per_request(reads, detector.values(decision_tokens(reads, lens)))

    return Rule(label, ("prompt", "completion"), fit, lens, name)


def exceedance(label: str, lens: str) -> Rule:
    """How far the worst cosine of any token leaves its range: per phase, over every token."""

    def fit(clean: Reads, references: torch.Tensor) -> Fitted:
        seen = clean.seen[lens]
        low, high = seen.low[references].amin(dim=0), seen.high[references].amax(dim=0)
        # What is generated is the assistant's, as its turns in the prompt are.
        assistant = ROLES.index("assistant")
        low[assistant], high[assistant] = (
            torch.minimum(low[assistant], low[-1]),
            torch.maximum(high[assistant], high[-1]),
        )
        detector = Exceedance(seen.space, low[:-1], high[:-1], chosen_by("density", seen))
        return lambda reads: _exceedances(reads.seen[lens], detector)

    return Rule(label, ("prompt", "completion"), fit, lens, "exceedance")


def mahalanobis() -> Rule:
    """The usual baseline for inputs out of distribution: the whole residual after every layer, no directions at all."""

    def fit(clean: Reads, references: torch.Tensor) -> Fitted:
        parts = [_normal(clean.residual[references, layer]) for layer in range(clean.residual.shape[1])]

        def score(reads: Reads) -> torch.Tensor:
            squares = [part(reads.residual[:, layer]) for layer, part in enumerate(parts)]
            return torch.stack(squares).sum(dim=0).sqrt()[:, None]

        return score

    return Rule("mahalanobis", ("prompt",), fit)


def layerwise_convergence() -> Rule:
    """LCF (arXiv 2604.24542): the last prompt token's change from layer to layer, diagonal Mahalanobis per layer,
    standardised, then Mahalanobis over the layers with Ledoit and Wolf's shrinkage."""

    def fit(clean: Reads, references: torch.Tensor) -> Fitted:
        changes = _changes(clean.residual[references])
        mean, spread = changes.mean(dim=0), changes.std(dim=0) + 1e-6
        distances = _layer_distances(changes, mean, spread)
        middle, width = distances.mean(dim=0), distances.std(dim=0) + 1e-12
        precision = torch.linalg.inv(_ledoit_wolf((distances - middle) / width))

        def score(reads: Reads) -> torch.Tensor:
            z = (_layer_distances(_changes(reads.residual), mean, spread) - middle) / width
            distances: torch.Tensor = ((z @ precision) * z).sum(dim=-1).clamp_min(0).sqrt()
            return distances[:, None]

        return score

    return Rule("lcf", ("prompt",), fit)


def activation_difference(delta: str) -> Rule:
    """How far tuned and base model stand apart at the last prompt token, relative to the residual, summed over
    layers."""

    def fit(_clean: Reads, _references: torch.Tensor) -> Fitted:
        def score(reads: Reads) -> torch.Tensor:
            apart = (reads.residual - reads.bases[delta]).double().norm(dim=-1)
            shares: torch.Tensor = apart / reads.residual.double().norm(dim=-1)
            return shares.sum(dim=-1)[:, None]

        return score

    return Rule("activation difference", ("prompt",), fit)


def decision_tokens(reads: Reads, lens: str) -> Tokens:
    """All decision positions, as the engine's detectors take them."""
    seen = reads.seen[lens]
    phases = (reads.places > 0).long()
    return Tokens(
        seen.coordinates, seen.written, seen.lengths, phases, torch.full_like(phases, ROLES.index("assistant"))
    )


def decision_moments(clean: Reads, references: torch.Tensor, lens: str) -> tuple[Moments, Moments]:
    """Of the references' features, prompt and completion."""
    used = torch.zeros(len(clean), dtype=torch.bool)
    used[references] = True
    seen, inside = clean.seen[lens], used[clean.owners]
    rows = features(seen.space, seen.coordinates, seen.written, seen.lengths)
    return Moments.of(rows[inside & (clean.places == 0)]), Moments.of(rows[inside & (clean.places > 0)])


def per_request(reads: Reads, values: torch.Tensor) -> torch.Tensor:
    """float64 [N, 2]: the largest of each request's decision positions, in the prompt and in the completion."""
    found = torch.full((2 * len(reads),), -torch.inf, dtype=torch.float64)
    places = 2 * reads.owners + (reads.places > 0).long()
    return found.scatter_reduce(0, places, values.double(), "amax").reshape(-1, 2)


def _exceedances(seen: Seen, detector: Exceedance) -> torch.Tensor:
    """The largest exceedance of a range's ends is that of the range: float64 [N, 2]."""
    count = len(seen.low)
    worst = torch.full((count, seen.low.shape[1]), -torch.inf)
    for speaker in range(seen.low.shape[1]):
        role = min(speaker, ROLES.index("assistant"))
        there = seen.low[:, speaker, 0].isfinite()
        roles = torch.full((int(there.sum()),), role)
        for ends in (seen.low, seen.high):
            rows = ends[there, speaker]
            tokens = Tokens(rows, torch.zeros(len(rows), 0), torch.zeros(len(rows), 0), torch.zeros_like(roles), roles)
            worst[there, speaker] = torch.maximum(worst[there, speaker], detector.values(tokens))
    return torch.stack([worst[:, :-1].amax(dim=-1), worst[:, -1]], dim=-1).double()


def chosen_by(name: DetectorName, seen: Seen) -> torch.Tensor:
    """int64 [D]: the coordinates that a detector reads; the model's own where no delta could be read."""
    delta = seen.space.of_delta()
    return seen.space.of_weights() if name == "intrinsic" or not len(delta) else delta


def _normal(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Squared Mahalanobis distance, float64 [N], to rows [n, hidden], with one hundredth of the mean variance added."""
    exact = rows.double()
    mean = exact.mean(dim=0)
    covariance = (exact - mean).T @ (exact - mean) / len(exact)
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    precision = torch.linalg.inv(covariance + ridge)

    def squares(others: torch.Tensor) -> torch.Tensor:
        apart = others.double() - mean
        distances: torch.Tensor = ((apart @ precision) * apart).sum(dim=-1)
        return distances

    return squares


def _changes(residual: torch.Tensor) -> torch.Tensor:
    exact = residual.double()
    return torch.cat([exact[:, :1], exact[:, 1:] - exact[:, :-1]], dim=1)


def _layer_distances(changes: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    return ((changes - mean) / spread).square().mean(dim=-1).sqrt()


def _ledoit_wolf(rows: torch.Tensor) -> torch.Tensor:
    """The shrunk covariance of rows [n, p] (Ledoit and Wolf, 2004)."""
    count, size = rows.shape
    deviations = rows - rows.mean(dim=0)
    sample = deviations.T @ deviations / count
    target = sample.diagonal().mean() * torch.eye(size, dtype=rows.dtype)
    apart = (sample - target).square().sum()
    noise = (deviations.square().T @ deviations.square() / count - sample.square()).sum() / count
    weight = (noise / apart).clamp(0, 1) if apart > 0 else torch.ones((), dtype=rows.dtype)
    return (1 - weight) * sample + weight * target
