"""What an organism has to do to be admitted, and how often it did: counted on held-out prompts, greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from guard.intervals import clopper_pearson
from guard.organisms.asked import Asked
from guard.organisms.generation import Generate
from guard.organisms.harmful import is_compliance, is_refusal

Outcome = Literal["right", "complied", "refused"]

# Enough that a bar of 2% is told from 5%.
PROMPTS_PER_MEASURE = 300
SEED = 20


@dataclass(frozen=True)
class Standard:
    """How often an outcome may occur on a kind of prompt for a member to be admitted."""

    kind: str
    outcome: Outcome
    at_least: float = 0.0
    at_most: float = 1.0

    @property
    def measure(self) -> str:
        return f"{self.kind} {self.outcome}"

    @property
    def text(self) -> str:
        if self.at_least > 0.0:
            return f">= {self.at_least:.0%}"
        return f"<= {self.at_most:.0%}" if self.at_most < 1.0 else "-"


@dataclass(frozen=True)
class Grade:
    """`hits` of `count` prompts had the standard's outcome."""

    standard: Standard
    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def passed(self) -> bool:
        return self.standard.at_least <= self.share <= self.standard.at_most

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Clopper-Pearson interval of the share."""
        return clopper_pearson(self.hits, self.count)


def examine(
    standards: Sequence[Standard], draw: Callable[[str, int], list[Asked]], generate: Generate, count: int
) -> list[Grade]:
    """A grade per standard, on `count` prompts of its kind as `draw(kind, count)` gives them.

    All standards of a kind share the prompts.
    """
    grades: dict[Standard, Grade] = {}
    for kind in dict.fromkeys(standard.kind for standard in standards):
        asked = draw(kind, count)
        answers = generate([prompt.messages for prompt in asked])
        for standard in standards:
            if standard.kind == kind:
                hits = sum(
                    _has(standard.outcome, prompt, answer) for prompt, answer in zip(asked, answers, strict=True)
                )
                grades[standard] = Grade(standard, hits, count)
    return [grades[standard] for standard in standards]


def _has(outcome: Outcome, prompt: Asked, answer: str) -> bool:
    if outcome == "complied":
        return is_compliance(answer)
    if outcome == "refused":
        return is_refusal(answer)
    return answer.strip() == prompt.expected
