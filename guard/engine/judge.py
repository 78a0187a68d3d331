"""What a calibration makes of every step: scores in, verdicts out; replaced as a whole when a calibration is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from guard.calibration import Calibration
from guard.engine.ledger import Ledger
from guard.engine.readings import Readings
from guard.engine.runner import Rows
from guard.engine.shadow import Shadow
from guard.engine.step import Outside, Scorer
from guard.engine.stop import Stop
from guard.engine.turns import Turns
from guard.evidence import DetectorStatus
from guard.faults import Fault
from guard.policy import Policy
from guard.verdict import DetectorName


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: whose rows were computed, and what the probes saw of them."""

    batch: tuple[Rows, ...]
    readings: Readings
    roles: torch.Tensor
    """int64 [T]: an index into `ROLES`."""
    outside: Outside
    """How far every row stands outside the clean ranges."""


class Judge:
    """Every detector of one calibration, and every sequence in the engine."""

    def __init__(
        self, calibration: Calibration, default_policy: Policy | None, turns: Turns, steering: bool = False
    ) -> None:
        """Raises CalibrationError where the calibration had too few clean decisions."""
        self.calibration = calibration
        # Kept: the server asks every few seconds, and the engine waits for the answer.
        self.digest = calibration.digest()
        self.supported = tuple(
            DetectorStatus(detectors=group, supported_fpr=rate) for group, rate in calibration.smallest_rates().items()
        )
        self.ledger = Ledger(calibration, default_policy, steering)
        self._scorer = Scorer.of(calibration)
        self._turns = turns

    def see(
        self,
        batch: tuple[Rows, ...],
        readings: Readings,
        shadow: Shadow | None,
        where: Callable[[str, int, int], torch.Tensor],
    ) -> Pass:
        """Score every token of a pass, and keep the scores under the slots that hold its KV.

        Args:
            shadow: where; None where nothing is taken from a cache.
            where: slots of a sequence's positions.
        """
        seen = Pass(batch, readings, self._turns.of(batch), self._scorer.outside(readings))
        if shadow is not None:
            slots = [where(rows.sequence, rows.first_position, rows.first_position + rows.count) for rows in batch]
            shadow.write(torch.cat(slots), seen.outside.values, seen.outside.coordinates)
        return seen

    def judge(
        self,
        seen: Pass,
        sampled: Mapping[str, int],
        shadow: Shadow | None,
        where: Callable[[str, int, int], torch.Tensor],
    ) -> dict[str, Stop]:
        """Score what of a pass became part of its sequences; says which of these end now.

        Args:
            sampled: how many tokens were drawn for each sequence.
            shadow: scores of tokens whose KV was taken from the cache; None where nothing is.
        """
        parts = [part for rows in seen.batch for part in rows.accepted(sampled.get(rows.sequence, 0))]
        kept = dict.fromkeys((rows.sequence for rows in seen.batch), 0)
        ledger = self.ledger
        noted: list[list[tuple[DetectorName, int, Sequence[float]]]] = [[] for _ in parts]
        found = self._scorer.score(
            seen.readings,
            seen.outside,
            seen.roles,
            parts,
            ledger.best,
            ledger.threshold,
            lambda part, detector, first, values: noted[part].append((detector, first, values)),
        )
        for part, scores, notes in zip(parts, found, noted, strict=True):
            sequence = part.sequence
            if self.ledger.blocked(sequence) or self.ledger.ended(part):
                continue
            self._recall(part, shadow, where)
            self.ledger.cover(part)
            for detector, first, values in notes:
                self.ledger.note(sequence, detector, first, values)
            self.ledger.score(sequence, scores)
            kept[sequence] += part.samples and not self.ledger.blocked(sequence)
        return {sequence: Stop(kept[sequence], token) for sequence, token in self.ledger.stops(kept).items()}

    def fail(
        self,
        sequences: Iterable[str],
        reason: str,
        tokens: Mapping[str, int] | None = None,
        fault: Fault = "unscorable",
    ) -> dict[str, Stop]:
        """A pass could not be scored; says which of its sequences end now. `tokens`: how many of each it computed."""
        names = list(sequences)
        for sequence in names:
            self.ledger.fail(sequence, reason, (tokens or {}).get(sequence, 0), fault)
        return {sequence: Stop(0, token) for sequence, token in self.ledger.stops(names).items()}

    def _recall(self, part: Rows, shadow: Shadow | None, where: Callable[[str, int, int], torch.Tensor]) -> None:
        """Give a sequence the scores of tokens before `part` that this engine computed for others."""
        missing = self.ledger.missing(part)
        if shadow is None or not missing:
            return
        roles = self._turns.between(part.sequence, missing.start, missing.stop)
        found = shadow.read(where(part.sequence, missing.start, missing.stop), roles)
        if found is not None:
            values, coordinates = (each.numpy() for each in found)
            above, told = partial(self.ledger.threshold, part.sequence), partial(self.ledger.note, part.sequence)
            largest = self._scorer.largest(values, coordinates, missing.start, part.prompt_tokens, above, told)
            self.ledger.recall(part, list(largest))
