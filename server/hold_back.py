"""How much of a choice's newest output a stream keeps back. Pure.

held = Held(kept(ruling.hold_back))
held.push(raw)
send(held.release())          # what lies before the newest chunks that are kept

What is counted is chunks: the engine puts at least one token into each that follows the one with the role, and several
where it speculates, batches its output (`--stream-interval`), or where nobody took the last ones. So N chunks are never
less than N tokens.
"""

from __future__ import annotations

from collections import deque

from server.config.policies import HoldBack, Window


def kept(hold_back: HoldBack) -> int | None:
    """How many of a choice's newest chunks are kept back; None: all of them, until the whole answer was judged."""
    if isinstance(hold_back, Window):
        return hold_back.window
    return None if hold_back == "answer" else 1


class Held:
    """The newest chunks of one choice, as their bytes came, oldest first. `kept`: see the function of that name."""

    __slots__ = ("_chunks", "_kept")

    def __init__(self, kept: int | None) -> None:
        self._chunks: deque[bytes] = deque()
        self._kept = kept

    def push(self, raw: bytes) -> None:
        """Take the choice's newest chunk."""
        self._chunks.append(raw)

    def release(self) -> list[bytes]:
        """Give away all but the newest that are kept."""
        if self._kept is None:
            return []
        return [self._chunks.popleft() for _ in range(len(self._chunks) - self._kept)]

    def release_all(self) -> list[bytes]:
        """Give away everything: the whole answer was judged."""
        released = list(self._chunks)
        self._chunks.clear()
        return released
