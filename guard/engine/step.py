"""One step of the engine, scored: the readings of a batch in, each sequence's largest scores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from guard.calibration import Calibration, ScoreKey
from guard.engine.probe import Readings
from guard.engine.runner_v1 import Rows
from guard.growth import Growth
from guard.scores import BankSpace, Detector, Tokens, TokenScores
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

    def score(
        self, readings: Readings, roles: torch.Tensor, batch: Sequence[Rows]
    ) -> Iterator[tuple[str, list[Score]]]:
        """Every detector's largest score of each sequence and phase in one step.

        Args:
            readings: of T rows, the batch's in order.
            roles: int64 [T], index into `ROLES`.
            batch: whose rows they are; counts sum to T.
        """
        positions = torch.cat([torch.arange(rows.first_position, rows.first_position + rows.count) for rows in batch])
        counts = torch.tensor([rows.count for rows in batch])
        prompts = torch.repeat_interleave(torch.tensor([rows.prompt_tokens for rows in batch]), counts)
        phases = (positions >= prompts).long()
        tokens = Tokens(readings.coordinates, readings.written, phases, roles)
        places = positions - prompts * phases
        decisions = torch.tensor([rows.first_row + rows.count - 1 for rows in batch if rows.samples], dtype=torch.int64)
        for name, detector in self.detectors.items():
            if detector.every_token:
                selected = torch.arange(len(positions))
                spans = [(rows, rows.first_row, rows.first_row + rows.count) for rows in batch]
            else:
                selected = decisions
                spans = [(rows, place, place + 1) for place, rows in enumerate(rows for rows in batch if rows.samples)]
            if not len(selected):
                continue
            scores = detector.score(tokens[selected])
            own_phases, own_positions = phases[selected], positions[selected]
            values = scores.values - self._allowances(name, detector, own_phases, places[selected])
            if detector.every_token and len(self.sinks):
                # NaN stays: what cannot be scored is no sink.
                values[torch.isin(own_positions, self.sinks) & ~values.isnan()] = -torch.inf
            scores = TokenScores(values, scores.layer_slots, scores.coordinates)
            for rows, first, last in spans:
                span = slice(first, last)
                yield rows.sequence, list(_largest(name, self.space, scores, own_phases, own_positions, span))

    def _allowances(
        self, name: DetectorName, detector: Detector, phases: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        allowances = torch.zeros(len(places))
        for index, phase in enumerate(PHASES):
            # The last token of a prompt is one token, however long the prompt is.
            if detector.every_token or phase == "completion":
                own = phases == index
                allowances[own] = self.growth[name, phase].allowance(places[own])
        return allowances


def _largest(
    detector: DetectorName,
    space: BankSpace,
    scores: TokenScores,
    phases: torch.Tensor,
    positions: torch.Tensor,
    span: slice,
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
            detector,
            phase,
            value,
            int(positions[row]),
            space.layers[int(scores.layer_slots[row])],
            space.names[int(scores.coordinates[row])],
        )
