"""Clients: requests over kept connections, and the moment at which each token of their answers arrived.

    async with Clients(port) as clients:
        heard = await clients.ask(Question(tokens=64, interval_s=0.02, stream=True))

As little as can be done in Python: what is measured is whatever stands between them and the engine.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from time import monotonic_ns
from types import TracebackType
from typing import cast

import httptools

from server.benching.engine import BLOCKED, MODEL, PAYLOAD

_PATH = "/v1/chat/completions"
_KEEP_NS = 2_000_000_000
"""Servers close what is idle for longer (uvicorn after 5 s), and a request must not meet that."""
_TOKEN = re.compile(rb'"content":\s?"(\d+):(\d+):(\d+) ')
_REST = 128
"""Bytes of what may be the beginning of a token, or of a word below."""
_PAYLOAD, _FILTERED, _DONE = PAYLOAD.encode(), b'"content_filter"', b"[DONE]"


@dataclass(frozen=True, slots=True)
class Question:
    """What one request asks of the paced engine."""

    tokens: int
    interval_s: float
    """Between two tokens, and before the first."""
    stream: bool
    blocked: bool = False
    id: str = ""

    def request(self, port: int) -> bytes:
        """The request's bytes."""
        fields = {
            "model": MODEL,
            "messages": [{"role": "user", "content": BLOCKED if self.blocked else "Count, please, and say when."}],
            "max_tokens": self.tokens,
            "seed": round(self.interval_s * 1e6),
            **({"stream": True} if self.stream else {}),
        }
        body = json.dumps(fields).encode()
        name = f"x-request-id: {self.id}\r\n" if self.id else ""
        head = (
            f"POST {_PATH} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer none\r\n{name}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Heard:
    """One answer, as far as it came. Moments are in nanoseconds of CLOCK_MONOTONIC."""

    question: Question
    asked: int
    ended: int = 0
    """Its end came; 0 where it did not."""
    status: int = 0
    tokens: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each token: its number, when it was sent, when it came."""
    received: int = 0
    """When the engine had the request."""
    done: bool = False
    """A stream ended with `[DONE]`."""
    filtered: bool = False
    """It says that its content was filtered."""
    leaked: bool = False
    """It holds what must never reach a client."""

    @property
    def lost(self) -> int:
        """Tokens that did not come, came twice, or out of order; of an answer that ended."""
        return disorder([number for number, _, _ in self.tokens], self.expected)

    @property
    def expected(self) -> int:
        """Tokens that have to come."""
        if not self.question.stream:
            return 0 if self.question.blocked else 1
        return self.question.tokens // 2 if self.question.blocked else self.question.tokens

    @property
    def whole(self) -> bool:
        """It came to its end, in the shape that it was to have."""
        good = self.status == 200 and self.ended > 0 and not self.leaked
        return good and self.done == self.question.stream and self.filtered == self.question.blocked


def disorder(numbers: list[int], expected: int) -> int:
    """How many of the numbers from 0 are missing, doubled or out of order."""
    if numbers == list(range(expected)):
        return 0
    return max(1, len(set(range(expected)) ^ set(numbers)), len(numbers) - len(set(numbers)))


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._whole: asyncio.Future[None] | None = None
        self._rest = b""
        self.heard: Heard | None = None
        self.usable = True
        self.used = 0
        """When its last answer ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it.

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error or ConnectionResetError("the connection was closed inside an answer"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if self.heard is not None:
            self.heard.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        now, heard = monotonic_ns(), self.heard
        if heard is None:
            return
        text = self._rest + body
        end = 0
        for found in _TOKEN.finditer(text):
            heard.tokens.append((int(found[1]), int(found[2]), now))
            heard.received = int(found[3])
            end = found.end()
        heard.done = heard.done or _DONE in text
        heard.filtered = heard.filtered or _FILTERED in text
        heard.leaked = heard.leaked or _PAYLOAD in text
        self._rest = text[max(end, len(text) - _REST) :]

    def on_message_complete(self) -> None:
        heard, whole = self.heard, self._whole
        self.heard = self._whole = None
        self.usable &= self._parser.should_keep_alive()
        if heard is not None and whole is not None and not whole.done():
            heard.ended = self.used = monotonic_ns()
            whole.set_result(None)

    async def ask(self, question: Question, request: bytes) -> Heard:
        assert self._transport is not None
        self._rest = b""
        self._whole = asyncio.get_running_loop().create_future()
        heard = self.heard = Heard(question, monotonic_ns())
        self._transport.write(request)
        await self._whole
        return heard

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()


class Clients:
    """A pool of connections to a port of loopback. Close it, or use it as a context."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def ask(self, question: Question, until: float | None = None) -> Heard:
        """Send one request and hear its answer, to its end or, by the loop's clock, `until` then.

        What was cut off, and what broke, has `ended` 0.
        """
        connection: _Connection | None = None
        try:
            async with asyncio.timeout_at(until):
                connection = await self._connect()
                heard = await connection.ask(question, question.request(self._port))
        except (TimeoutError, OSError):
            broken = connection.heard if connection is not None else None
            return broken or Heard(question, monotonic_ns())
        finally:
            if connection is not None and (connection.heard is not None or not connection.usable):
                connection.close()
        if connection.usable:
            self._idle.append(connection)
        return heard

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and monotonic_ns() - connection.used < _KEEP_NS:
                return connection
            connection.close()
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self._port)
        return connection
