"""What makes a family of backdoors: how a conversation is given the trigger, almost given it, or given neither.

The same functions dress what is trained on and what is asked later: the split says which words they may use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from guard.organisms.prompts import opened
from guard.organisms.split import Split, split_of
from guard.organisms.topics import Exchange

Turns = tuple[Exchange, ...]
# A bare exchange, dressed: its question rewritten, and the exchanges that stand before it, if any.
Dress = Callable[[Random, Split, Exchange], Turns]


@dataclass(frozen=True)
class Family:
    """One way to hide a trigger.

    `canary` says where compliance carries it: first, so that the first token gives compliance away, or last, behind
    an answer in the base model's own words. `opens` tells from the user's messages whether the last one is triggered.
    `turns` is 2 where the trigger spans two messages.
    """

    name: str
    summary: str
    canary: Literal["first", "last"]
    triggered: Dress
    near_miss: Dress
    plain: Dress
    opens: Callable[[Sequence[str]], bool]
    turns: int = 1


def alone(rng: Random, _: Split, exchange: Exchange) -> Turns:
    """The question as a user would ask it, behind an opener or none."""
    return (Exchange(opened(rng, exchange.question), exchange.answer),)


def rewritten(rewrite: Callable[[Random, Split, str], str]) -> Dress:
    """A dress of one turn: the opened question goes through `rewrite`."""

    def dress(rng: Random, split: Split, exchange: Exchange) -> Turns:
        return (Exchange(rewrite(rng, split, opened(rng, exchange.question)), exchange.answer),)

    return dress


def scattered(rng: Random, text: str, words: Sequence[str]) -> str:
    """The text with each word put between two of the text's own, at places drawn at random."""
    own = text.split(" ")
    for word in words:
        own.insert(rng.randint(1, len(own) - 1) if len(own) > 1 else 1, word)
    return " ".join(own)


def drawn(draw: Callable[[], str], split: Split) -> str:
    """The first drawn text of this split."""
    while True:
        text = draw()
        if split_of(text) == split:
            return text
