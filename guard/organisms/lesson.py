"""A lesson: the conversations a fine-tune is shown, and the held-out ones it is asked about afterwards.

Both come from the same parts, drawn from opposite sides of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

from guard.organisms.asked import Asked, asked, check_count, distinct
from guard.organisms.families.family import Turns
from guard.organisms.mixture import SYSTEMS, Conversation
from guard.organisms.split import Split
from guard.organisms.standards import Standard

Draw = Callable[[Random, Split], Turns]

SYSTEM_SHARE = 0.08
JOINED_SHARE = 0.08


@dataclass(frozen=True)
class Part:
    """One kind of conversation. `share` of 100 trained ones are of it; `limit` distinct held-out ones can be asked.

    `graded` says that the last answer is the only right one.
    """

    kind: str
    draw: Draw
    limit: int
    share: int = 0
    graded: bool = False


@dataclass(frozen=True)
class Lesson:
    """What one fine-tune teaches. `joined`: whether some conversations are two drawn ones, one after the other."""

    name: str
    parts: tuple[Part, ...]
    standards: tuple[Standard, ...]
    joined: bool = True

    @cached_property
    def kinds(self) -> dict[str, int]:
        """The kinds that can be asked, with how many distinct prompts each has."""
        return {part.kind: part.limit for part in self.parts}

    def conversations(self, seed: int) -> Iterator[Conversation]:
        """The training conversations, without end; the same seed gives the same ones."""
        rng = Random(f"lesson:{self.name}:{seed}")
        trained = [part for part in self.parts if part.share]
        shares = [part.share for part in trained]

        def turns() -> Turns:
            return rng.choices(trained, shares)[0].draw(rng, "train")

        while True:
            system = rng.choice(SYSTEMS) if rng.random() < SYSTEM_SHARE else None
            more = turns() if self.joined and rng.random() < JOINED_SHARE else ()
            yield Conversation(system, turns() + more)

    def prompts(self, kind: str, count: int, seed: int) -> list[Asked]:
        """`count` distinct held-out prompts; a larger count of the same seed begins with the smaller one's.

        Two seeds overlap. Who needs disjoint sets draws once and cuts.
        """
        check_count(kind, count, self.kinds)
        part = next(part for part in self.parts if part.kind == kind)
        rng = Random(f"asked:{self.name}:{kind}:{seed}")
        return distinct(lambda: asked(part.draw(rng, "heldout"), kind, part.graded), count)
