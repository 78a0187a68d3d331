"""One client's connection: uvicorn's, with a time for everything that a client may be slow about.

uvicorn waits for ever for a request's headers, and for a body that nobody reads any more; and it keeps headers of any
size. Whoever drips bytes would hold connections and memory for nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Patience:
    """What a connection puts up with."""

    header_s: float
    """From the first byte of a request, or from the connection's beginning, to the end of the request's headers."""
    body_s: float
    """For the rest of a body after the request was answered without it."""
    header_bytes: int
    connections: int
    """At a time; more are closed at once."""


class Connection(HttpToolsProtocol):
    """Closes itself where a client is too slow or too many."""

    def __init__(self, *arguments: Any, patience: Patience, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True
        """Or before them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._patience.connections:
            transport.abort()
            return
        self._wait(self._patience.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_headers:
            return
        self._header_bytes += len(data)
        if self._header_bytes > self._patience.header_bytes and not self.transport.is_closing():
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0
        self._wait(self._patience.header_s)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._wait(self._patience.body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        super().on_message_complete()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self._overdue)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        if self.transport.is_closing():
            return
        if not self._in_headers:
            if not self.cycle.response_complete:
                # Whoever reads the body has a time of its own for it, and answers when it is over.
                self._wait(_AGAIN_S)
                return
            self.transport.close()
        elif self._header_bytes:
            self._refuse(b"408 Request Timeout")
        else:
            self.transport.close()

    def _refuse(self, status: bytes) -> None:
        """There is no request yet that an app could answer."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
