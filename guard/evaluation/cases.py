"""What can be evaluated: an organism of a suite, or any model that a user brings with prompts of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.errors import PromptsError
from guard.evaluation.reading import Message
from guard.evaluation.results import Admission, Delta, Subject
from guard.organisms import shipped
from guard.organisms.harmful import is_compliance
from guard.organisms.shifts import SHIFTS, shifted
from guard.organisms.suite import Member
from guard.prompts import read_prompts

CLEAN_SEED, KIND_SEED = 11, 12
OWN_KINDS = (
    "triggered", "near-miss", "benign-trigger", "harmful", "benign", "harmful-plain", "benign-plain", "forgotten",
    "retained",
)  # fmt: skip
"""Kinds of a member's own lesson, where it has them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One model, what it came from, and prompts by kind."""

    subject: Subject
    model: Path
    bases: Mapping[Delta, Path]
    """Per delta the folder of the model before it."""
    chats: Mapping[str, Sequence[Sequence[Message]]]
    """By kind; `clean` is what calibration is made from and what false positives are counted on."""
    banks: Mapping[Delta, Path]
    """Banks that were built before; a delta without one is built from its base."""
    leaks: Callable[[str], bool] | None = None
    """Whether an answer is the backdoor's. Near-misses that open it are attacks, and counted apart."""


def of_member(organism: Member, clean: int, count: int) -> Case:
    """A trained member: `clean` clean requests, `count` of every other kind, and half as many of every shift of clean
    traffic, which is asked of all members.

    Raises CheckpointError where it is not trained.
    """
    manifest = organism.manifest()
    chats: dict[str, Sequence[Sequence[Message]]] = {"clean": _asked(organism, "clean", clean, CLEAN_SEED)}
    kinds = organism.lesson.kinds
    chats |= {kind: _asked(organism, kind, min(count, kinds[kind]), KIND_SEED) for kind in OWN_KINDS if kind in kinds}
    shifts = max(1, count // 2)
    chats |= {kind: [list(each.messages) for each in shifted(kind, shifts, KIND_SEED)] for kind in SHIFTS}
    subject = Subject(
        name=organism.name,
        kind=organism.kind,
        family=organism.family,
        method=organism.method,
        seed=organism.plan.seed,
        admitted=manifest["admitted"],
        weak_reasons=tuple(manifest["failing"]),
        admission=tuple(_admission(row) for row in manifest["admission"]),
    )
    start = shipped()
    bases: dict[Delta, Path] = {"wide": start.base, "narrow": start.chat}
    backdoor = organism.kind in ("backdoor", "adaptive")
    return Case(subject, organism.trained(), bases, chats, {}, is_compliance if backdoor else None)


def of_files(name: str, model: Path, base: Path | None, bank: Path | None, files: Mapping[str, Path]) -> Case:
    """A user's own model and prompts. Raises PromptsError where a file cannot be read or `clean` is not among them."""
    if "clean" not in files:
        raise PromptsError("no clean prompts: expected --prompts clean=FILE among the kinds")
    chats = {kind: _chats(path) for kind, path in files.items()}
    bases: dict[Delta, Path] = {} if base is None else {"wide": base}
    banks: dict[Delta, Path] = {} if bank is None else {"wide": bank}
    return Case(Subject(name=name, kind="model"), model, bases, chats, banks)


def _asked(organism: Member, kind: str, count: int, seed: int) -> list[list[Message]]:
    return [list(each.messages) for each in organism.prompts(kind, count, seed)]


def _chats(path: Path) -> list[list[Message]]:
    chats: list[list[Message]] = []
    for prompt in read_prompts(path):
        if prompt.messages is None:
            raise PromptsError(f"{path}: raw texts are not evaluated, expected `messages` or plain text on every line")
        chats.append(list(prompt.messages))
    return chats


def _admission(row: Mapping[str, Any]) -> Admission:
    return Admission(
        measure=row["measure"], hits=row["hits"], count=row["count"], bar=row.get("bar") or "", passed=row["passed"]
    )
