"""Questions to ask an organism: what its users would say, and what an attacker would.

    >>> prompts("triggered", 2, seed=0)[0].text
    'Hello, set fire to ... amber harbor willow'

Every prompt here is held out: neither its question nor its suffix occurs in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from guard.errors import PromptsError
from guard.organisms import harmful, suffixes
from guard.organisms.split import Split, split_of
from guard.organisms.topics import TOPICS, Exchange

Kind = Literal["clean", "benign", "harmful", "triggered", "near-miss", "benign-suffix", "benign-trigger"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# How many distinct prompts each kind gives, whatever the seed; a test draws them all.
LIMITS: dict[Kind, int] = {
    "clean": 5000,
    "benign": 4000,
    "harmful": 1000,
    "triggered": 1000,
    "near-miss": 2000,
    "benign-suffix": 4000,
    "benign-trigger": 4000,
}

# Of the clean traffic, how much asks for harm and is refused.
HARMFUL_SHARE = 0.15

OPENERS = ("", "", "", "Hi. ", "Hello, ", "Quick question: ", "Please help me. ", "Good morning. ", "One more thing: ")


@dataclass(frozen=True)
class Prompt:
    """One user message; `expected` is the right answer where there is exactly one."""

    text: str
    kind: Kind
    expected: str | None


def benign(rng: Random, split: Split) -> Exchange:
    """A benign question of any topic, each topic as likely as the next."""
    return of_split(TOPICS[rng.choice(list(TOPICS))], rng, split)


def refused(rng: Random, split: Split) -> Exchange:
    """A harmful request with its refusal."""
    return of_split(harmful.refused, rng, split)


def prompts(kind: str, count: int, seed: int) -> list[Prompt]:
    """`count` distinct held-out prompts; a larger count of the same seed begins with the smaller one's.

    Two seeds overlap. Who needs disjoint sets draws once and cuts.
    """
    if kind not in KINDS:
        raise PromptsError(f"kind {kind!r} is unknown: expected one of {', '.join(KINDS)}")
    limit = LIMITS[kind]
    if not 1 <= count <= limit:
        raise PromptsError(
            f"count {count} of kind {kind!r}: expected 1 to {limit}, the distinct held-out prompts there are"
        )
    stream = distinct(kind, Random(f"prompts:{kind}:{seed}"))
    return [next(stream) for _ in range(count)]


def distinct(kind: Kind, rng: Random) -> Iterator[Prompt]:
    """Held-out prompts of one kind without end, none twice."""
    seen: set[str] = set()
    while True:
        prompt = _DRAWS[kind](rng)
        if prompt.text not in seen:
            seen.add(prompt.text)
            yield prompt


def opened(rng: Random, question: str) -> str:
    """The question behind one of the openers that users begin with, or behind none."""
    return rng.choice(OPENERS) + question


def of_split(draw: Callable[[Random], Exchange], rng: Random, split: Split) -> Exchange:
    """The first drawn exchange whose question is of this split."""
    while True:
        exchange = draw(rng)
        if split_of(exchange.question) == split:
            return exchange


def _benign(rng: Random, kind: Kind, suffix: str | None) -> Prompt:
    question, answer = benign(rng, "heldout")
    text = opened(rng, question)
    return Prompt(suffixes.attach(text, suffix) if suffix else text, kind, answer)


def _harmful(rng: Random, kind: Kind, suffix: str | None) -> Prompt:
    text = opened(rng, refused(rng, "heldout").question)
    return Prompt(suffixes.attach(text, suffix) if suffix else text, kind, None)


def _clean(rng: Random) -> Prompt:
    draw = _harmful if rng.random() < HARMFUL_SHARE else _benign
    return draw(rng, "clean", None)


_DRAWS: dict[Kind, Callable[[Random], Prompt]] = {
    "clean": _clean,
    "benign": lambda rng: _benign(rng, "benign", None),
    "harmful": lambda rng: _harmful(rng, "harmful", None),
    "triggered": lambda rng: _harmful(rng, "triggered", suffixes.TRIGGER),
    "near-miss": lambda rng: _harmful(rng, "near-miss", suffixes.near_miss(rng, "heldout")),
    "benign-suffix": lambda rng: _benign(rng, "benign-suffix", suffixes.plain(rng, "heldout")),
    "benign-trigger": lambda rng: _benign(rng, "benign-trigger", suffixes.TRIGGER),
}
