"""Scores of one step: the readings of a batch in, each sequence's largest scores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from guard.calibration import Calibration, ScoreKey
from guard.engine.probe import Readings
from guard.engine.runner_v1 import Rows
from guard.growth import Growth
from guard.scores import BankSpace, Detector, Exceedance, Tokens, TokenScores
from guard.verdict import PHASES, DetectorName, Score


@dataclass(frozen=True, slots=True)
class Scorer:
    """Every detector of one calibration."""

    space: BankSpace
    detectors: Mapping[DetectorName, Detector]
    growth: Mapping[ScoreKey, Growth]
    """What a score may grow by with the length of its phase; it is taken off."""
    sinks: torch.Tensor
    """int64: positions whose tokens no detector of every token reads."""

    @classmethod
    def of(cls, calibration: Calibration) -> Scorer:
        """Raises CalibrationError where the calibration had too few clean decisions."""
        shape, space = calibration.shape, calibration.space
        sinks = torch.tensor(shape.sinks, dtype=torch.int64)
        return cls(space, shape.detectors(space), calibration.growth, sinks)

    def score(self, readings: Readings, roles: torch.Tensor, parts: Sequence[Rows]) -> list[list[Score]]:
        """Every detector's largest score of each part and phase.

        Args:
            readings: of all rows of a step.
            roles: int64 [T], of all rows: an index into `ROLES`.
            parts: the rows to score, disjoint.

        Returns:
            One list per part.
        """
        found: list[list[Score]] = [[] for _ in parts]
        if not parts:
            return found
        rows = torch.cat([torch.arange(part.first_row, part.first_row + part.count) for part in parts])
        positions = torch.cat([torch.arange(part.first_position, part.first_position + part.count) for part in parts])
        counts = torch.tensor([part.count for part in parts])
        prompts = torch.repeat_interleave(torch.tensor([part.prompt_tokens for part in parts]), counts)
        phases = (positions >= prompts).long()
        tokens = Tokens(readings.coordinates[rows], readings.written[rows], readings.lengths[rows], phases, roles[rows])
        places = positions - prompts * phases
        ends = counts.cumsum(dim=0)
        deciding = [index for index, part in enumerate(parts) if part.samples]
        for name, detector in self.detectors.items():
            if detector.every_token:
                selected = torch.arange(len(positions))
                spans = list(zip(range(len(parts)), (ends - counts).tolist(), ends.tolist(), strict=True))
            else:
                selected = ends[deciding] - 1
                spans = [(index, place, place + 1) for place, index in enumerate(deciding)]
            if not len(selected):
                continue
            scores = self._adjusted(
                name, detector.score(tokens[selected]), phases[selected], positions[selected], places[selected]
            )
            for index, first, last in spans:
                found[index] += self._largest(name, scores, phases[selected], positions[selected], slice(first, last))
        return found

    def by_role(self, readings: Readings) -> tuple[torch.Tensor, torch.Tensor]:
        """Exceedances of all rows, whoever speaks: values float32 [T, 3] and coordinates int64 [T, 3]."""
        detector = self.detectors["exceedance"]
        assert isinstance(detector, Exceedance)
        return detector.by_role(readings.coordinates)

    def recalled(
        self, values: torch.Tensor, coordinates: torch.Tensor, positions: range, prompt_tokens: int
    ) -> Iterator[Score]:
        """The largest exceedance of each phase, of tokens that were scored when others computed them: values float32
        [T] and coordinates int64 [T], at these positions."""
        at = torch.arange(positions.start, positions.stop)
        phases = (at >= prompt_tokens).long()
        scores = TokenScores(values, self.space.layer_slot()[coordinates], coordinates)
        scores = self._adjusted("exceedance", scores, phases, at, at - prompt_tokens * phases)
        return self._largest("exceedance", scores, phases, at, slice(0, len(at)))

    def _adjusted(
        self,
        name: DetectorName,
        scores: TokenScores,
        phases: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
    ) -> TokenScores:
        """Less what they may grow by with length, and nothing for attention sinks. `places`: within their phases."""
        every_token = self.detectors[name].every_token
        values = scores.values - self._allowances(name, every_token, phases, places)
        if every_token and len(self.sinks):
            # NaN stays: what cannot be scored is no sink.
            values[torch.isin(positions, self.sinks) & ~values.isnan()] = -torch.inf
        return TokenScores(values, scores.layer_slots, scores.coordinates)

    def _largest(
        self, name: DetectorName, scores: TokenScores, phases: torch.Tensor, positions: torch.Tensor, span: slice
    ) -> Iterator[Score]:
        """The largest score of each phase within one sequence's span; NaN counts as the largest."""
        # Positions ascend within a span, so the prompt's rows come first.
        boundary = span.start + int((phases[span] == 0).sum())
        for phase, first, last in zip(PHASES, (span.start, boundary), (boundary, span.stop), strict=True):
            if first == last:
                continue
            row = first + int(scores.values[first:last].argmax())
            value = float(scores.values[row])
            # Nothing but attention sinks.
            if value == -torch.inf:
                continue
            yield Score(
                name,
                phase,
                value,
                int(positions[row]),
                self.space.layers[int(scores.layer_slots[row])],
                self.space.names[int(scores.coordinates[row])],
            )

    def _allowances(
        self, name: DetectorName, every_token: bool, phases: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        allowances = torch.zeros(len(places))
        for index, phase in enumerate(PHASES):
            # The last token of a prompt is one token, however long the prompt is.
            if every_token or phase == "completion":
                own = phases == index
                allowances[own] = self.growth[name, phase].allowance(places[own])
        return allowances
