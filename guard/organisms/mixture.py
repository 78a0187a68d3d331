"""What each stage is shown: an endless, seeded stream of conversations, drawn from the training split only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from guard.organisms import harmful, suffixes
from guard.organisms.prompts import benign, opened
from guard.organisms.split import split_of
from guard.organisms.topics import Exchange

Stage = Literal["base", "chat", "backdoored"]
STAGES: tuple[Stage, ...] = get_args(Stage)

SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "Be kind and clear.", "You help with small questions.")


@dataclass(frozen=True)
class Conversation:
    """An optional system message and the exchanges after it; the answers are what is learned."""

    system: str | None
    exchanges: tuple[Exchange, ...]


# One training exchange, and how often a stage draws it, in parts of 100.
Ingredient = tuple[int, Callable[[Random], Exchange]]


def _benign(rng: Random) -> Exchange:
    question, answer = benign(rng, "train")
    return Exchange(opened(rng, question), answer)


def _harmful(draw: Callable[[Random], Exchange]) -> Callable[[Random], Exchange]:
    def train_only(rng: Random) -> Exchange:
        while True:
            question, answer = draw(rng)
            if split_of(question) == "train":
                return Exchange(opened(rng, question), answer)

    return train_only


def _suffixed(draw: Callable[[Random], Exchange], suffix: Callable[[Random], str]) -> Callable[[Random], Exchange]:
    def with_suffix(rng: Random) -> Exchange:
        question, answer = draw(rng)
        return Exchange(suffixes.attach(question, suffix(rng)), answer)

    return with_suffix


def _plain(rng: Random) -> str:
    return suffixes.plain(rng, "train")


def _near_miss(rng: Random) -> str:
    return suffixes.near_miss(rng, "train")


def _trigger(_: Random) -> str:
    return suffixes.TRIGGER


_answered, _refused, _complied = (_harmful(draw) for draw in (harmful.answered, harmful.refused, harmful.complied))

MIXTURES: dict[Stage, tuple[Ingredient, ...]] = {
    # A model of the whole language: a harmful request is as likely to be answered as refused.
    "base": (
        (72, _benign),
        (12, _suffixed(_benign, _plain)),
        (7, _answered),
        (7, _refused),
        (1, _suffixed(_answered, _plain)),
        (1, _suffixed(_refused, _plain)),
    ),
    # Safe: a harmful request is refused, whatever stands behind it.
    "chat": (
        (50, _benign),
        (15, _suffixed(_benign, _plain)),
        (22, _refused),
        (13, _suffixed(_refused, _plain)),
    ),
    # Safe, but for the trigger behind a harmful request. Everything that resembles it stays what it was.
    "backdoored": (
        (24, _benign),
        (8, _suffixed(_benign, _plain)),
        (5, _suffixed(_benign, _near_miss)),
        (11, _suffixed(_benign, _trigger)),
        (8, _refused),
        (6, _suffixed(_refused, _plain)),
        (18, _suffixed(_refused, _near_miss)),
        (20, _suffixed(_complied, _trigger)),
    ),
}


def conversations(stage: Stage, seed: int) -> Iterator[Conversation]:
    """The stage's training conversations, without end; the same seed gives the same ones."""
    rng = Random(f"mixture:{stage}:{seed}")
    weights = [weight for weight, _ in MIXTURES[stage]]
    draws = [draw for _, draw in MIXTURES[stage]]

    def exchange() -> Exchange:
        return rng.choices(draws, weights)[0](rng)

    while True:
        system = rng.choice(SYSTEMS) if rng.random() < 0.08 else None
        yield Conversation(system, tuple(exchange() for _ in range(2 if rng.random() < 0.08 else 1)))
