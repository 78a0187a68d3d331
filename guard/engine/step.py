"""Scores of one step: the readings of a batch in, each sequence's largest scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from guard.calibration import Calibration, ScoreKey
from guard.engine.kernels import ops
from guard.engine.readings import Readings
from guard.engine.runner import Rows
from guard.engine.trail import window
from guard.growth import Growth
from guard.scores import BankSpace, Density, Exceedance
from guard.verdict import PHASES, DetectorName, Score

Values = npt.NDArray[np.float32]
Coordinates = npt.NDArray[np.int64]
Best = Callable[[str, ScoreKey], float]
"""A sequence's largest score so far, of a detector and phase."""


Note = Callable[[int, DetectorName, int, Sequence[float]], None]
"""Takes, of the part with this index, a detector's scores, less growth, of tokens from a position on."""


def unnoted(_part: int, _detector: DetectorName, _first: int, _values: Sequence[float]) -> None:
    """Nobody keeps them."""


_UNNOTED = partial(unnoted, 0)


def none_known(_sequence: str, _key: ScoreKey) -> float:
    """Of a sequence of which nothing is known."""
    return -np.inf


def no_threshold(_key: ScoreKey) -> float:
    """Of a sequence whose scores are held against nothing."""
    return np.inf


def not_held(_sequence: str, key: ScoreKey) -> float:
    """The same, by sequence."""
    return no_threshold(key)


@dataclass(frozen=True, slots=True)
class Outside:
    """How far T tokens stand outside the clean ranges, for each role that they could have."""

    values: torch.Tensor
    """float32 [T, 3]."""
    coordinates: torch.Tensor
    """int64 [T, 3]: the coordinates that contribute most."""

    def spoken(self, roles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values float32 [T] and coordinates int64 [T] of tokens with these roles, int64 [T]."""
        own = roles[:, None]
        return self.values.gather(1, own)[:, 0], self.coordinates.gather(1, own)[:, 0]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Every detector of one calibration."""

    space: BankSpace
    distances: Mapping[DetectorName, Density]
    """At decisions."""
    exceedance: Exceedance
    """At every token."""
    growth: Mapping[ScoreKey, Growth]
    """What a score may grow by with the length of its phase; it is taken off."""
    sinks: tuple[int, ...]
    """Positions whose tokens no detector of every token reads."""
    slots: tuple[int, ...]
    """Of each coordinate the index into the watched layers."""

    @classmethod
    def of(cls, calibration: Calibration) -> Scorer:
        """Raises CalibrationError where the calibration had too few clean decisions."""
        ops.install()
        shape, space = calibration.shape, calibration.space
        detectors = shape.detectors(space)
        distances = {name: each for name, each in detectors.items() if isinstance(each, Density)}
        exceedance = detectors["exceedance"]
        assert isinstance(exceedance, Exceedance)
        return cls(space, distances, exceedance, calibration.growth, shape.sinks, tuple(space.layer_slot().tolist()))

    def outside(self, readings: Readings) -> Outside:
        """Exceedances of all T rows, whoever speaks: a token whose state another request takes from the cache may be
        another speaker's there."""
        values, places = torch.ops.undertow.worst(readings.cosines, self.exceedance.low, self.exceedance.high)
        return Outside(values, self.exceedance.chosen[places])

    def score(
        self,
        readings: Readings,
        outside: Outside,
        roles: torch.Tensor,
        parts: Sequence[Rows],
        best: Best = none_known,
        threshold: Best = not_held,
        note: Note = unnoted,
    ) -> list[list[Score]]:
        """Every detector's largest score of each part and phase, where it is larger than the sequence's `best`: only
        such a score has to be explained, and explaining costs as much as scoring.

        Args:
            readings: of all rows of a step.
            outside: their exceedances.
            roles: int64 [T], of all rows: an index into `ROLES`.
            parts: the rows to score, disjoint.
            threshold: what a sequence's scores are held against, for the first position that lies above it.
            note: is told the latest scores of each part, and those around one that is too large.

        Returns:
            One list per part.

        Raises:
            UnscoredError: a row that decides was not read in full.
        """
        found: list[list[Score]] = [[] for _ in parts]
        if parts:
            self._every_token(outside, roles, parts, best, threshold, note, found)
        if any(part.samples for part in parts):
            self._decisions(readings, parts, best, threshold, note, found)
        return found

    def _every_token(
        self,
        outside: Outside,
        roles: torch.Tensor,
        parts: Sequence[Rows],
        best: Best,
        threshold: Best,
        note: Note,
        found: list[list[Score]],
    ) -> None:
        values, coordinates = (each.numpy() for each in outside.spoken(roles))
        for index, part in enumerate(parts):
            rows = slice(part.first_row, part.first_row + part.count)
            above, told = partial(threshold, part.sequence), partial(note, index)
            scores = self.largest(values[rows], coordinates[rows], part.first_position, part.prompt_tokens, above, told)
            for score in scores:
                if not score.value <= best(part.sequence, (score.detector, score.phase)):
                    found[index].append(score)

    def largest(
        self,
        values: Values,
        coordinates: Coordinates,
        first_position: int,
        prompt_tokens: int,
        threshold: Callable[[ScoreKey], float] = no_threshold,
        note: Callable[[DetectorName, int, Sequence[float]], None] = _UNNOTED,
    ) -> Iterator[Score]:
        """The largest exceedance of each phase, of one sequence's tokens from a position on: values float32 [T] and
        coordinates int64 [T]."""
        boundary = min(max(0, prompt_tokens - first_position), len(values))
        for phase, start, stop in ((0, 0, boundary), (1, boundary, len(values))):
            if start == stop:
                continue
            first = first_position + start
            adjusted = self._less_growth("exceedance", phase, values[start:stop], first - prompt_tokens * phase)
            for sink in self.sinks:
                # NaN stays: what cannot be scored is no sink.
                if first <= sink < first + len(adjusted) and not np.isnan(adjusted[sink - first]):
                    adjusted = adjusted.copy()
                    adjusted[sink - first] = -np.inf
            # NaN counts as the largest.
            row = int(adjusted.argmax())
            flags = not adjusted[row] <= threshold(("exceedance", PHASES[phase]))
            kept = window(len(adjusted), row if flags else None)
            note("exceedance", first + kept.start, adjusted[kept].tolist())
            if adjusted[row] != -np.inf:
                coordinate = int(coordinates[start + row])
                slot = self.slots[coordinate]
                score = self._told("exceedance", phase, float(adjusted[row]), first + row, slot, coordinate)
                limit = threshold(("exceedance", PHASES[phase]))
                if not score.value <= limit:
                    # Compared as the score was: a threshold is no float32, and NaN lies above every one.
                    above = ~(adjusted[: row + 1].astype(np.float64) <= limit)
                    score = replace(score, first=first + int(above.argmax()))
                yield score

    def _decisions(
        self,
        readings: Readings,
        parts: Sequence[Rows],
        best: Best,
        threshold: Best,
        note: Note,
        found: list[list[Score]],
    ) -> None:
        deciding = [(index, part, part.count - 1) for index, part in enumerate(parts) if part.samples]
        features = readings.full(torch.tensor([part.first_row + last for _, part, last in deciding]))
        places = [part.first_position + last for _, part, last in deciding]
        phases = [int(place >= part.prompt_tokens) for place, (_, part, _) in zip(places, deciding, strict=True)]
        which = torch.tensor(phases)
        for name, detector in self.distances.items():
            values = detector.distances(features, which, torch.ops.undertow.squares).numpy()
            chosen: list[tuple[int, float]] = []
            for row, ((_, part, _), place, phase) in enumerate(zip(deciding, places, phases, strict=True)):
                value = values[row : row + 1]
                if phase:
                    # The last token of a prompt is one token, however long the prompt is.
                    value = self._less_growth(name, phase, value, place - part.prompt_tokens)
                told = float(value[0])
                note(deciding[row][0], name, place, (told,))
                if not told <= best(part.sequence, (name, PHASES[phase])):
                    chosen.append((row, told))
            if chosen:
                rows = [row for row, _ in chosen]
                slots, coordinates = detector.explain_features(features[rows], which[rows])
                for (row, value_), slot, coordinate in zip(chosen, slots.tolist(), coordinates.tolist(), strict=True):
                    index, part, _ = deciding[row]
                    score = self._told(name, phases[row], value_, places[row], slot, coordinate)
                    if not score.value <= threshold(part.sequence, (name, score.phase)):
                        score = replace(score, first=score.position)
                    found[index].append(score)

    def _told(self, name: DetectorName, phase: int, value: float, position: int, slot: int, coordinate: int) -> Score:
        return Score(name, PHASES[phase], value, position, self.space.layers[slot], self.space.names[coordinate])

    def _less_growth(self, name: DetectorName, phase: int, values: Values, first: int) -> Values:
        """Less what scores of tokens from a place of their phase on, counted from 0, may grow by."""
        growth = self.growth[name, PHASES[phase]]
        if first + len(values) <= growth.tokens:
            return values
        less: Values = values - growth.allowance(torch.arange(first, first + len(values))).numpy()
        return less
