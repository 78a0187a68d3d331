"""A TCP relay before an engine, which can do to connections what networks and dying processes do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["pass", "drop_kept", "drop_all", "swallow"]
"""drop_kept: closes a connection that has served before, as its next request arrives. drop_all: every connection, as a
request arrives. swallow: takes requests and says nothing."""


class Relay:
    """Passes bytes to `target` and back. `mode` can be changed at any time; completion requests alone are harmed."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self.mode: Mode = "pass"
        self.harmed = 0
        self.open = 0
        """Connections of the proxy's."""
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._up.wait(5)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(5)
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._up.set()
        await self._ended.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        served = False
        back: asyncio.Task[None] | None = None
        up: asyncio.StreamWriter | None = None
        try:
            while received := await reader.read(65536):
                ours = received.startswith(b"POST /v1/") and b"x-request-id: canary-" not in received
                if ours and (self.mode == "drop_all" or (self.mode == "drop_kept" and served)):
                    self.harmed += 1
                    return
                if ours and self.mode == "swallow":
                    self.harmed += 1
                    while await reader.read(65536):
                        pass
                    return
                served = True
                if up is None:
                    down, up = await asyncio.open_connection(self._target.hostname, self._target.port)
                    back = asyncio.create_task(_pump(down, writer))
                up.write(received)
        except (OSError, asyncio.CancelledError):
            pass  # the other side, or the test, is at its end
        finally:
            self.open -= 1
            if back is not None and up is not None:
                back.cancel()
                up.close()
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while received := await reader.read(65536):
            writer.write(received)
    except OSError:
        pass
    finally:
        writer.close()


@contextmanager
def relayed(target: str) -> Iterator[Relay]:
    relay = Relay(target)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()
