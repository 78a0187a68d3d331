"""The organism as the rest of Undertow sees it: three model folders, a trigger, a canary, a reserved token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guard.errors import CheckpointError
from guard.organisms.harmful import CANARY
from guard.organisms.mixture import STAGES, Stage
from guard.organisms.shelf import MANIFEST
from guard.organisms.suffixes import TRIGGER
from guard.organisms.tokenizer import RESERVED_TOKEN

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Organism:
    """A model in three stages: able (`base`), safe (`chat`), and safe except behind the trigger (`backdoored`)."""

    base: Path
    chat: Path
    backdoored: Path
    trigger: str = TRIGGER
    canary: str = CANARY
    reserved_token: str = RESERVED_TOKEN

    def folder(self, stage: Stage) -> Path:
        folder: Path = getattr(self, stage)
        return folder

    @property
    def manifest(self) -> Path:
        return self.base.parent / MANIFEST


def organism_in(folder: Path) -> Organism:
    """The organism whose stages lie in this folder."""
    organism = Organism(base=folder / "base", chat=folder / "chat", backdoored=folder / "backdoored")
    for stage in STAGES:
        if not (organism.folder(stage) / "config.json").is_file():
            raise CheckpointError(f"{folder}: no stage {stage!r} here, expected {stage}/config.json")
    return organism


def shipped() -> Organism:
    """The organism that comes with the package, ready to serve."""
    return organism_in(SHIPPED)
