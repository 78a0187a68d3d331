"""From reads to rates: one subject under one bank, every rule at equal false-positive rates, on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from guard.conformal import JointRanks
from guard.errors import CalibrationError
from guard.evaluation.reading import Reads
from guard.evaluation.results import (
    Delta,
    DirectionShare,
    Latency,
    Layers,
    LengthPoint,
    Lengths,
    Phase,
    Rate,
    Roc,
    Splits,
)
from guard.evaluation.rules import PAPER_EPSILON, Rule, chosen_by, decision_moments, decision_tokens
from guard.scores import Density

POLICY = ("density",)
"""The detectors that share the rate in the policy that is served by default."""
PAPER = "paper rule"
ROC_POINTS = 60
LENGTH_POINTS = 120
"""Prompts per kind in a scatter."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which clean requests do what."""

    references: torch.Tensor
    held_out: torch.Tensor
    test: torch.Tensor

    @classmethod
    def of(cls, count: int, references: int, held_out: int, seed: int) -> Cut:
        """int64 each, dealt at random; what is left of `count` is for the test."""
        dealt = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return cls(dealt[:references], dealt[references : references + held_out], dealt[references + held_out :])


@dataclass(frozen=True, slots=True)
class Scored:
    """All scores of one rule: float64 [N, phases] by kind; `clean` holds every clean request."""

    rule: Rule
    kinds: Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Measured:
    """What one subject adds to the results."""

    rates: list[Rate] = field(default_factory=list)
    roc: list[Roc] = field(default_factory=list)
    layers: list[Layers] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One subject under one bank."""

    subject: str
    delta: Delta
    kinds: Mapping[str, Reads]
    """`clean` is the pool that is cut; every other kind is tested whole."""
    cut: Cut
    targets: Sequence[float]
    headline: float

    def score(self, rules: Sequence[Rule]) -> dict[str, Scored]:
        """Fit every rule on the references and score every prompt."""
        scored = {}
        for rule in rules:
            fitted = rule.fit(self.kinds["clean"], self.cut.references)
            scored[rule.name] = Scored(rule, {kind: fitted(reads) for kind, reads in self.kinds.items()})
        return scored

    def measure(self, rules: Sequence[Rule], policies: Mapping[str, Sequence[str]]) -> Measured:
        """Rates of every rule alone and of every policy: its name, and the rules that share the rate."""
        scored = self.score(rules)
        groups = {rule.name: (rule.name,) for rule in rules} | {name: tuple(names) for name, names in policies.items()}
        found = Measured()
        for name, names in groups.items():
            together = [scored[each] for each in names]
            found.rates += self._rates(name, together)
            if "triggered" in self.kinds:
                found.roc.append(self._roc(name, together))
                if any("completion" in each.rule.phases for each in together):
                    found.latency.append(self._latency(name, together))
        if "exceedance" in scored:
            found.rates += self._paper_rates(scored["exceedance"])
        return found

    def headline_rates(self, rule: Rule, kinds: Sequence[str]) -> tuple[float, ...] | None:
        """One rule's share of each kind that is flagged in either phase, NaN for a kind that there is not; None where
        the held-out requests are too few for the headline's rate."""
        (scored,) = self.score([rule]).values()
        thresholds = self._thresholds([scored], self.headline)
        if thresholds is None:
            return None
        return tuple(
            float(self._flags([scored], thresholds, kind, "both").double().mean()) if kind in self.kinds else math.nan
            for kind in kinds
        )

    def _thresholds(self, together: Sequence[Scored], target: float) -> list[torch.Tensor] | None:
        """float64 [phases] per rule; None where the held-out requests are too few for the rate."""
        ranks = _ranks(together, self.cut.held_out)
        try:
            return [
                torch.tensor(
                    [ranks.threshold((each.rule.name, phase), target) for phase in each.rule.phases],
                    dtype=torch.float64,
                )
                for each in together
            ]
        except CalibrationError:
            return None

    def _rates(self, name: str, together: Sequence[Scored]) -> list[Rate]:
        rates = []
        for target in self.targets:
            thresholds = self._thresholds(together, target)
            if thresholds is None:
                continue
            for kind in self.kinds:
                flags = {phase: self._flags(together, thresholds, kind, phase) for phase in _phases(together)}
                rates += [
                    Rate(
                        subject=self.subject,
                        delta=self.delta,
                        detector=name,
                        phase=phase,
                        kind=kind,
                        target=target,
                        flagged=int(flag.sum()),
                        count=len(flag),
                    )
                    for phase, flag in flags.items()
                ]
        return rates

    def _flags(
        self, together: Sequence[Scored], thresholds: Sequence[torch.Tensor], kind: str, phase: Phase
    ) -> torch.Tensor:
        """bool [N]: flagged by any rule of the group, in this phase or in either."""
        flagged = None
        for each, limit in zip(together, thresholds, strict=True):
            columns = [index for index, name in enumerate(each.rule.phases) if phase in ("both", name)]
            over = (self._of(each, kind)[:, columns] > limit[columns]).any(dim=-1)
            flagged = over if flagged is None else flagged | over
        assert flagged is not None
        return flagged

    def _of(self, scored: Scored, kind: str) -> torch.Tensor:
        return scored.kinds[kind][self.cut.test] if kind == "clean" else scored.kinds[kind]

    def _paper_rates(self, scored: Scored) -> list[Rate]:
        """The rule as published: no threshold but epsilon. Its ranges are those of the references alone: the held-out
        requests, which it has no use for, would widen them. `curves.py` says what it does with all of them."""
        rates = []
        phases: tuple[Phase, ...] = ("prompt", "completion", "both")
        for kind in self.kinds:
            over = self._of(scored, kind) > PAPER_EPSILON
            for phase, flag in zip(phases, (over[:, 0], over[:, 1], over.any(dim=-1)), strict=True):
                rates.append(
                    Rate(
                        subject=self.subject,
                        delta=self.delta,
                        detector=PAPER,
                        phase=phase,
                        kind=kind,
                        target=None,
                        flagged=int(flag.sum()),
                        count=len(flag),
                    )
                )
        return rates

    def _roc(self, name: str, together: Sequence[Scored]) -> Roc:
        """p-values make scores of different rules one scale; thresholds on it are the curve."""
        ranks = _ranks(together, self.cut.held_out)
        clean, triggered = (_p_values(together, ranks, self._of, kind) for kind in ("clean", "triggered"))
        levels = np.unique(np.concatenate([clean, triggered]))
        if len(levels) > ROC_POINTS:
            # Low rates matter: as many points below 1% as above.
            levels = np.unique(np.quantile(levels, np.linspace(0, 1, ROC_POINTS) ** 2))
        return Roc(
            subject=self.subject,
            delta=self.delta,
            detector=name,
            phase="both",
            fpr=tuple(float((clean <= level).mean()) for level in levels),
            tpr=tuple(float((triggered <= level).mean()) for level in levels),
        )

    def _latency(self, name: str, together: Sequence[Scored]) -> Latency:
        """Tokens generated until the first decision position over the threshold. Exceedance keeps no places: what it
        flags in a completion counts as found at its end."""
        thresholds = self._thresholds(together, self.headline)
        reads = self.kinds["triggered"]
        places: list[int] = []
        missed = len(reads)
        if thresholds is not None:
            prompt = self._flags(together, thresholds, "triggered", "prompt")
            either = self._flags(together, thresholds, "triggered", "both")
            first = self._first_places(together, thresholds)
            for request in range(len(reads)):
                if prompt[request]:
                    places.append(0)
                elif either[request]:
                    places.append(first.get(request, int(reads.completion_tokens[request])))
            missed = len(reads) - len(places)
        return Latency(
            subject=self.subject,
            delta=self.delta,
            detector=name,
            tokens=tuple(places),
            undetected=missed,
            count=len(reads),
        )

    def _first_places(self, together: Sequence[Scored], thresholds: Sequence[torch.Tensor]) -> dict[int, int]:
        """By request the first generated token that a density rule flags."""
        reads, clean = self.kinds["triggered"], self.kinds["clean"]
        first: dict[int, int] = {}
        for each, limit in zip(together, thresholds, strict=True):
            if each.rule.lens is None or each.rule.detector is None or each.rule.detector == "exceedance":
                continue
            seen = clean.seen[each.rule.lens]
            chosen = chosen_by(each.rule.detector, seen)
            moments = decision_moments(clean, self.cut.references, each.rule.lens)
            detector = Density(each.rule.detector, seen.space, moments, chosen)
            values = detector.values(decision_tokens(reads, each.rule.lens))
            over = (values.double() > limit[1]) & (reads.places > 0)
            for request, place in zip(reads.owners[over].tolist(), reads.places[over].tolist(), strict=True):
                first[request] = min(place, first.get(request, place))
        return first

    def shares(self, lens: str, kind: str) -> Layers:
        """In which layers, and along which directions, this kind's last prompt tokens lie away from clean."""
        clean, reads = self.kinds["clean"], self.kinds[kind]
        seen = clean.seen[lens]
        chosen = chosen_by("density", seen)
        detector = Density("density", seen.space, decision_moments(clean, self.cut.references, lens), chosen)
        tokens = decision_tokens(reads, lens)[reads.places == 0]
        shares = detector.shares(tokens).mean(dim=0).clamp_min(0)
        shares = shares / shares.sum().clamp_min(1e-12)
        slots = seen.space.layer_slot()[chosen]
        by_layer = torch.zeros(len(seen.space.layers)).index_add_(0, slots, shares)
        top = shares.argsort(descending=True)[:8].tolist()
        return Layers(
            subject=self.subject,
            delta=self.delta,
            kind=kind,
            layers=seen.space.layers,
            share=tuple(by_layer.tolist()),
            top=tuple(
                DirectionShare(direction=seen.space.names[int(chosen[place])], share=float(shares[place]))
                for place in top
            ),
        )

    def lengths(self, scored: Scored, kinds: Sequence[str]) -> Lengths:
        """Length of the prompt against its score."""
        thresholds = self._thresholds([scored], self.headline)
        points = [
            LengthPoint(tokens=tokens, score=score, kind=kind)
            for kind in kinds
            if kind in self.kinds
            for tokens, score in zip(
                self.kinds[kind].prompt_tokens[:LENGTH_POINTS].tolist(),
                scored.kinds[kind][:LENGTH_POINTS, 0].tolist(),
                strict=True,
            )
        ]
        return Lengths(
            subject=self.subject,
            delta=self.delta,
            detector=scored.rule.name,
            points=tuple(points),
            threshold=float("nan") if thresholds is None else float(thresholds[0][0]),
        )


def splits(
    subject: str,
    delta: Delta,
    clean: Reads,
    rules: Sequence[Rule],
    name: str,
    targets: Sequence[float],
    sizes: tuple[int, int],
    seeds: Sequence[int],
) -> list[Splits]:
    """The false-positive rate of rules that share a rate, over random calibration splits of one pool of clean requests.

    `sizes`: references and held-out requests of every split; the rest of the pool is the test.
    """
    rates: dict[float, list[float]] = {target: [] for target in targets}
    test = len(clean) - sum(sizes)
    for seed in tqdm(seeds, desc=f"{subject}: calibration splits", unit="split"):
        cut = Cut.of(len(clean), *sizes, seed)
        evaluation = Evaluation(subject, delta, {"clean": clean}, cut, targets, targets[0])
        together = list(evaluation.score(rules).values())
        for target in targets:
            thresholds = evaluation._thresholds(together, target)
            if thresholds is not None:
                rates[target].append(float(evaluation._flags(together, thresholds, "clean", "both").double().mean()))
    return [
        Splits(subject=subject, delta=delta, detector=name, target=target, rates=tuple(each), held_out=test)
        for target, each in rates.items()
        if each
    ]


def _phases(together: Sequence[Scored]) -> tuple[Phase, ...]:
    if any("completion" in each.rule.phases for each in together):
        return ("prompt", "completion", "both")
    return ("prompt", "both")


def _ranks(together: Sequence[Scored], held_out: torch.Tensor) -> JointRanks[tuple[str, str]]:
    return JointRanks(
        {
            (each.rule.name, phase): each.kinds["clean"][held_out, index].tolist()
            for each in together
            for index, phase in enumerate(each.rule.phases)
        }
    )


def _p_values(
    together: Sequence[Scored], ranks: JointRanks[tuple[str, str]], of: object, kind: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    assert callable(of)
    smallest = None
    for each in together:
        values = of(each, kind)
        for index, phase in enumerate(each.rule.phases):
            column = np.array([ranks.p_value((each.rule.name, phase), value) for value in values[:, index].tolist()])
            smallest = column if smallest is None else np.minimum(smallest, column)
    assert smallest is not None
    return smallest
