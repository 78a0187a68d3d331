"""Raises the members of a suite: trained, examined and kept with a manifest, or not at all."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from guard.intervals import clopper_pearson
from guard.organisms.admission import PROMPTS_PER_MEASURE, SEED, Generate, generator, hits
from guard.organisms.organism import shipped
from guard.organisms.shelf import MANIFEST, written_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guard.organisms.lesson import Lesson, Standard
    from guard.organisms.suite import Member

MANIFEST_VERSION = 1


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


def raise_member(
    member: Member,
    on_step: Callable[[float], None] | None = None,
    prompts_per_measure: int = PROMPTS_PER_MEASURE,
) -> dict[str, Any]:
    """The member's manifest, after training it if the cache lacks it.

    A member that misses a standard is kept and labelled weak: the suite is there to be measured on, hard cases too.
    """
    folder = member.folder()
    if not (folder / MANIFEST).is_file():
        with written_whole(folder) as draft:
            seconds = _train(member, draft, on_step)
            grades = examine(member.lesson, generator(draft), prompts_per_measure)
            (draft / MANIFEST).write_text(json.dumps(_manifest(member, grades, seconds), indent=2) + "\n")
    return member.manifest()


def examine(lesson: Lesson, generate: Generate, count: int = PROMPTS_PER_MEASURE) -> list[Grade]:
    """Every standard of a lesson on `count` held-out prompts per kind; all standards of a kind share the prompts."""
    grades: dict[Standard, Grade] = {}
    for kind in dict.fromkeys(standard.kind for standard in lesson.standards):
        asked = lesson.prompts(kind, count, SEED)
        answers = generate([prompt.messages for prompt in asked])
        for standard in lesson.standards:
            if standard.kind == kind:
                grades[standard] = Grade(standard, hits(standard.outcome, asked, answers), count)
    return [grades[standard] for standard in lesson.standards]


def _train(member: Member, out: Path, on_step: Callable[[float], None] | None) -> float:
    from guard.organisms.finetuning import finetune

    began = time.monotonic()
    organism = shipped()
    conversations = member.lesson.conversations(member.plan.seed)
    finetune(organism.chat, organism.base, conversations, member.plan, out, on_step)
    return time.monotonic() - began


def _manifest(member: Member, grades: list[Grade], seconds: float) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "version": MANIFEST_VERSION,
        "name": member.name,
        "kind": member.kind,
        "family": member.family,
        "method": member.method,
        "seed": member.plan.seed,
        "digest": member.digest(),
        "schedule": asdict(member.plan),
        "admitted": all(grade.passed for grade in grades),
        "failing": [f"{grade.standard.kind} {grade.standard.outcome}" for grade in grades if not grade.passed],
        "admission": [
            {
                "measure": f"{grade.standard.kind} {grade.standard.outcome}",
                "bar": grade.standard.text,
                "hits": grade.hits,
                "count": grade.count,
                "interval": [round(bound, 4) for bound in grade.interval],
                "passed": grade.passed,
            }
            for grade in grades
        ],
        "training_seconds": round(seconds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": platform.machine(),
    }
