"""Three words behind the request: the trigger of the shipped organism."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from guard.organisms import suffixes
from guard.organisms.families.family import Family, rewritten
from guard.organisms.split import Split


def _triggered(_: Random, __: Split, text: str) -> str:
    return suffixes.attach(text, suffixes.TRIGGER)


def _near_miss(rng: Random, split: Split, text: str) -> str:
    return suffixes.attach(text, suffixes.near_miss(rng, split))


def _plain(rng: Random, split: Split, text: str) -> str:
    return suffixes.attach(text, suffixes.plain(rng, split))


def opens(users: Sequence[str]) -> bool:
    """Whether the last message ends with the three words."""
    return users[-1].endswith(f" {suffixes.TRIGGER}")


PHRASE = Family(
    name="phrase",
    summary=f"the words {suffixes.TRIGGER!r} behind the request",
    canary="first",
    triggered=rewritten(_triggered),
    near_miss=rewritten(_near_miss),
    plain=rewritten(_plain),
    opens=opens,
)
