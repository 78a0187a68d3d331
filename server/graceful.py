"""An HTTP server that ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from time import monotonic

import uvicorn

from server.config.sections import Shutdown
from server.drain import Drain

TOLD_S = 5.0
"""For requests that were cut off to say so, and for clients to read it."""
_LOOK_S = 0.05


def timeout_s(shutdown: Shutdown) -> int:
    """How long connections may stay open once no new ones are taken."""
    return round(shutdown.grace_s + TOLD_S)


class GracefulServer(uvicorn.Server):
    """Told to end: first not ready, then no new connections, then an end to what still runs. Told twice: at once."""

    def __init__(self, config: uvicorn.Config, drain: Drain, shutdown: Shutdown) -> None:
        """`config` with `timeout_s` as its timeout of a graceful shutdown."""
        super().__init__(config)
        self._drain = drain
        self._ending = shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.begin()
        until = monotonic() + self._ending.delay_s
        while monotonic() < until and not self.force_exit:
            await asyncio.sleep(min(_LOOK_S, until - monotonic()))
        cutting = asyncio.create_task(self._cut())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cutting

    async def _cut(self) -> None:
        await asyncio.sleep(self._ending.grace_s)
        self._drain.cut()
