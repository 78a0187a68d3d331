"""Requests that wait for room in an engine, in the order in which they came.

engine = await queue.wait(["gpu-1", "gpu-2"], deadline)     # its room is the caller's; None: look again
if not queue.hand_on("gpu-1"): ...                          # room that became free, and nobody waits for it
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from time import monotonic

from server.errors import UpstreamError


class Queue:
    """Room is handed on from one request to the next, so that none that comes later overtakes."""

    def __init__(self, most: int, give_back: Callable[[str], None]) -> None:
        """`most`: how many may wait. `give_back` gets room that was handed to one that gave up in the same moment."""
        self._most = most
        self._give_back = give_back
        # In order; a dict, so that leaving is cheap.
        self._waiting: dict[asyncio.Future[str | None], Collection[str]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, engines: Collection[str], deadline: float) -> str | None:
        """Wait until one of these has room, which is then the caller's; None where engines came or went instead.

        `deadline` on the monotonic clock. Raises UpstreamError `busy` then, and where too many wait already.
        """
        left = deadline - monotonic()
        if left <= 0 or len(self._waiting) >= self._most:
            raise self._busy(engines)
        place: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting[place] = engines
        try:
            await asyncio.wait((place,), timeout=left)
        except asyncio.CancelledError:
            if place.done() and (engine := place.result()) is not None:
                self._give_back(engine)
            raise
        finally:
            self._waiting.pop(place, None)
        if not place.done():
            raise self._busy(engines)
        return place.result()

    def hand_on(self, engine: str) -> bool:
        """Give an engine's room to the first that waits for it; False where nobody does."""
        for place, engines in self._waiting.items():
            if engine in engines:
                del self._waiting[place]
                place.set_result(engine)
                return True
        return False

    def wake_all(self) -> None:
        """Who waits looks again: engines came or went."""
        for place in self._waiting:
            place.set_result(None)
        self._waiting.clear()

    def _busy(self, engines: Collection[str]) -> UpstreamError:
        return UpstreamError("busy", f"no room in {', '.join(sorted(engines))}; {len(self)} requests wait")
