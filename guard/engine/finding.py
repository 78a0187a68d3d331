"""What one version of the guard says of one detector and phase of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from guard.evidence import ScoreEvidence
from guard.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, and where and when it came to it."""

    verdict: Verdict
    """Of the largest score."""
    first: int | None
    """Position of the first token above the threshold."""
    generation: int
    """Of the guard."""

    @property
    def weight(self) -> tuple[bool, float]:
        """Orders findings of several guards, whose scores do not compare."""
        return self.verdict.exceeded, self.verdict.ratio

    def evidence(self) -> ScoreEvidence:
        """As it is told."""
        score = self.verdict.score
        return ScoreEvidence(
            detector=score.detector,
            phase=score.phase,
            score=score.value,
            threshold=self.verdict.threshold,
            p_value=self.verdict.p_value,
            position=score.position,
            first=self.first,
            layer=score.layer,
            direction=score.direction,
            generation=self.generation,
        )
