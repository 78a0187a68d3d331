"""Scores of one step: the readings of a batch in, each sequence's largest scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from guard.calibration import Calibration, ScoreKey
from guard.engine.probe import Readings
from guard.engine.runner_v1 import Rows
from guard.growth import Growth
from guard.scores import BankSpace, Detector, Exceedance, Tokens
from guard.verdict import PHASES, DetectorName, Score

Best = Callable[[str, ScoreKey], float]
"""A sequence's largest score so far, of a detector and phase."""


def none_known(_sequence: str, _key: ScoreKey) -> float:
    """Of a sequence of which nothing is known."""
    return -np.inf


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
        self, readings: Readings, roles: torch.Tensor, parts: Sequence[Rows], best: Best = none_known
    ) -> list[list[Score]]:
        """Every detector's largest score of each part and phase, where it is larger than the sequence's `best`: only
        such a score has to be explained, and explaining costs as much as scoring.

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
        counts = torch.tensor([part.count for part in parts])
        ends = counts.cumsum(dim=0)
        offsets = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - counts, counts)
        rows = torch.repeat_interleave(torch.tensor([part.first_row for part in parts]), counts) + offsets
        positions = torch.repeat_interleave(torch.tensor([part.first_position for part in parts]), counts) + offsets
        prompts = torch.repeat_interleave(torch.tensor([part.prompt_tokens for part in parts]), counts)
        phases = (positions >= prompts).long()
        tokens = Tokens(readings.coordinates[rows], readings.written[rows], readings.lengths[rows], phases, roles[rows])
        places = positions - prompts * phases
        deciding = [index for index, part in enumerate(parts) if part.samples]
        for name, detector in self.detectors.items():
            if detector.every_token:
                own, at, where = tokens, positions, places
                spans = list(zip(range(len(parts)), (ends - counts).tolist(), ends.tolist(), strict=True))
            else:
                selected = ends[deciding] - 1
                own, at, where = tokens[selected], positions[selected], places[selected]
                spans = [(index, place, place + 1) for place, index in enumerate(deciding)]
            if not spans:
                continue
            values = self._adjusted(name, detector.values(own), own.phases, at, where)
            chosen = [
                (index, row)
                for index, first, last in spans
                for row in _largest(values, own.phases, first, last)
                if not values[row] <= best(parts[index].sequence, (name, PHASES[int(own.phases[row])]))
            ]
            if chosen:
                told = torch.tensor([row for _, row in chosen])
                slots, coordinates = detector.explain(own[told])
                for (index, row), slot, coordinate in zip(chosen, slots.tolist(), coordinates.tolist(), strict=True):
                    found[index].append(
                        self._told(name, int(own.phases[row]), float(values[row]), int(at[row]), slot, coordinate)
                    )
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
        adjusted = self._adjusted("exceedance", values, phases, at, at - prompt_tokens * phases)
        slots = self.space.layer_slot()
        for row in _largest(adjusted, phases, 0, len(at)):
            coordinate = int(coordinates[row])
            yield self._told(
                "exceedance", int(phases[row]), float(adjusted[row]), int(at[row]), int(slots[coordinate]), coordinate
            )

    def _told(self, name: DetectorName, phase: int, value: float, position: int, slot: int, coordinate: int) -> Score:
        return Score(name, PHASES[phase], value, position, self.space.layers[slot], self.space.names[coordinate])

    def _adjusted(
        self,
        name: DetectorName,
        values: torch.Tensor,
        phases: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
    ) -> npt.NDArray[np.float32]:
        """Less what scores may grow by with length, and nothing for attention sinks. `places`: within their phases."""
        every_token = self.detectors[name].every_token
        values = values - self._allowances(name, every_token, phases, places)
        if every_token and len(self.sinks):
            # NaN stays: what cannot be scored is no sink.
            values[torch.isin(positions, self.sinks) & ~values.isnan()] = -torch.inf
        adjusted: npt.NDArray[np.float32] = values.numpy()
        return adjusted

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


def _largest(values: npt.NDArray[np.float32], phases: torch.Tensor, first: int, last: int) -> Iterator[int]:
    """The rows of the largest value of each phase between two rows; NaN counts as the largest, and what has no value
    but minus infinity, as attention sinks, has no largest."""
    boundary = last
    if last - first > 1 or int(phases[first]):
        # Positions ascend within a span, so the prompt's rows come first.
        boundary = first + int((phases[first:last] == 0).sum())
    for start, stop in ((first, boundary), (boundary, last)):
        if start == stop:
            continue
        row = start + int(values[start:stop].argmax())
        if values[row] != -np.inf:
            yield row
