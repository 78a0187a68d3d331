"""Work that ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive

from guard.errors import UndertowError


class ClientGone(UndertowError):  # noqa: N818 - it is an event, not a fault
    """The client closed its connection before its answer was complete."""


async def unless_gone(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run `work`; cancel it as soon as the client disconnects. Raises ClientGone.

    The request's body must have been read. Cancelling waits until `work` has cleaned up, so the engine is told.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client left")
        task.result()
    finally:
        await _cancel(watch)
        await _cancel(task)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Task[None]) -> None:
    if task.done():
        return
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # Seen: it ended anyway.
