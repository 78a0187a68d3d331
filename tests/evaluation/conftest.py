"""The shipped organism, read once: a bank of the wide delta, and prompts of four kinds through it."""

from __future__ import annotations

import pytest

from guard.bank import Bank, random_bank
from guard.directions import build_bank
from guard.evaluation.reading import Message, Reader, Reads
from guard.organisms import prompts, shipped

LENSES = ("wide", "random")
COUNTS = {"clean": 700, "triggered": 60, "near-miss": 60, "benign-suffix": 60}


@pytest.fixture(scope="session")
def wide() -> Bank:
    organism = shipped()
    return build_bank(organism.base, organism.backdoored)


def chats(kind: str, count: int, seed: int = 5) -> list[list[Message]]:
    return [[{"role": "user", "content": prompt.text}] for prompt in prompts(kind, count, seed)]


@pytest.fixture(scope="session")
def kinds(wide: Bank) -> dict[str, Reads]:
    with Reader(shipped().backdoored, {"wide": wide, "random": random_bank(wide, 0)}, max_tokens=32) as reader:
        return {kind: reader.read(chats(kind, count)) for kind, count in COUNTS.items()}
