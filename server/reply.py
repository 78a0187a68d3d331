"""The answer on its way to the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.types import Send

from server.errors import ApiError
from server.protocols.protocol import Protocol, StreamWriter

JSON = "application/json"


class Reply:
    """Writes one HTTP response, whole or in parts, as the client speaks. `on_start` is called right before its first
    byte."""

    def __init__(self, send: Send, protocol: Protocol, request_id: str, on_start: Callable[[], None]) -> None:
        self._send = send
        self._protocol = protocol
        self._writer: StreamWriter | None = None
        self._request_id = request_id
        self._on_start = on_start
        self.always: Mapping[str, str] = {}
        """Headers of whatever is answered."""
        self.status = 0
        """As sent; 0 where nothing was."""
        self.complete = False
        """Everything that the client needs was sent: if it leaves now, it has its answer."""

    @property
    def started(self) -> bool:
        return self.status != 0

    async def whole(self, status: int, body: bytes, kind: str = JSON, headers: Mapping[str, str] | None = None) -> None:
        """Status, headers and body at once."""
        await self._start(status, kind, {**(headers or {}), "content-length": str(len(body))})
        self.complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def error(self, error: ApiError, headers: Mapping[str, str] | None = None) -> None:
        """An error, as a response or, where a stream has begun, as its last event."""
        if self.complete:
            return
        if not self.started:
            await self.whole(error.status, self._protocol.error(error), headers={**error.headers, **(headers or {})})
            return
        await self.part(error.sse() + b"data: [DONE]\n\n")
        await self.end()

    async def begin_stream(self, writer: StreamWriter, headers: Mapping[str, str]) -> None:
        """Status and headers of a stream of events, which `writer` writes."""
        self._writer = writer
        await self._start(200, "text/event-stream; charset=utf-8", {**headers, "cache-control": "no-cache"})

    async def part(self, part: bytes) -> None:
        """A part of a stream: whole events of OpenAI's."""
        written = self._writer.write(part) if self._writer else part
        if written:
            await self._send({"type": "http.response.body", "body": written, "more_body": True})

    async def end(self) -> None:
        """The end of a stream."""
        self.complete = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.status = status
        self._on_start()
        pairs = {"content-type": kind, "x-request-id": self._request_id, **self.always, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
