"""The end of a server: requests that run may end, within a time; what is left is cut off in a shape that clients read.

drain.begin()      not ready any more; goes on serving
drain.cut()        requests that still run end now, each with an error of its own
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from server.errors import ShuttingDown


class Drain:
    """What runs while the server ends."""

    def __init__(self) -> None:
        self.begun = False
        """The server was told to end."""
        self._over = False
        self._running: set[asyncio.Task[Any]] = set()

    def begin(self) -> None:
        """Say that it ends: whoever asks whether it is ready hears no."""
        self.begun = True

    def cut(self) -> None:
        """End what still runs."""
        self._over = True
        for task in self._running:
            task.cancel()

    async def bounded(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in this task. Raises ShuttingDown where `cut` ended it."""
        task = asyncio.current_task()
        assert task is not None
        if self._over:
            work.close()
            raise ShuttingDown()
        self._running.add(task)
        try:
            await work
        except asyncio.CancelledError:
            if not self._over:
                raise
            task.uncancel()
            raise ShuttingDown() from None
        finally:
            self._running.discard(task)
