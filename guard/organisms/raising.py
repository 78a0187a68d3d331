"""Raises the members of a suite: trained, examined and kept with a manifest, or not at all."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from guard.organisms.generation import generator
from guard.organisms.organism import shipped
from guard.organisms.shelf import MANIFEST, written_whole
from guard.organisms.standards import PROMPTS_PER_MEASURE, SEED, Grade, examine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guard.organisms.suite import Member

MANIFEST_VERSION = 1


def raise_member(
    member: Member,
    on_step: Callable[[float], None] | None = None,
    prompts_per_measure: int = PROMPTS_PER_MEASURE,
) -> dict[str, Any]:
    """The member's manifest, after training it if the cache lacks it.

    A member that misses a standard is kept and labelled weak: the suite is there to be measured on, hard cases too.
    """
    if not member.is_trained:
        with written_whole(member.folder()) as draft:
            seconds = _train(member, draft, on_step)
            grades = examine(
                member.lesson.standards,
                lambda kind, count: member.prompts(kind, count, SEED),
                generator(draft),
                prompts_per_measure,
            )
            (draft / MANIFEST).write_text(json.dumps(_manifest(member, grades, seconds), indent=2) + "\n")
    return member.manifest()


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
        "failing": [grade.standard.measure for grade in grades if not grade.passed],
        "admission": [
            {
                "measure": grade.standard.measure,
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
