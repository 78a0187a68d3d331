"""The engine's HTTP side: kept connections, and the answers that it gives.

    async with upstream.post(CHAT.path, body, authorization, request_id, stopwatch) as answer:
        answer.evidence
        async for received in answer.chunks(): ...

Why aiohttp: docs/decisions/0020-http-client.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp
from yarl import URL

from guard.errors import ConfigError
from guard.evidence import REQUEST_HEADER, STATUS_AGE, STATUS_PATH
from server.config.upstream import UpstreamSettings
from server.errors import Repeat, UpstreamError, bad_request
from server.telemetry.stopwatch import Stopwatch

_EVIDENCE_HEADER = REQUEST_HEADER.encode()
_STATUS_TIMEOUT_S = 5.0
# vLLM closes idle connections after 5 s; we let go first, so that no request meets a connection that is just closing.
_KEEP_ALIVE_S = 2.0
_HEADER_BYTES = 256 * 1024
"""Longest header of an answer: evidence is under 1 KB per sequence, and one request can have many."""
_BUFFER_BYTES = 64 * 1024
"""Of an answer that nobody took yet. With twice as much the engine's socket is not read any more."""
_SLICE_BYTES = 16 * 1024
"""Of an answer that are worked on before it is another one's turn: about 60 tokens, far less than 1 ms."""


def engine_key(name: str, settings: UpstreamSettings, environ: Mapping[str, str]) -> str | None:
    """The key that an engine is asked with; None where the client's own goes along. Raises ConfigError."""
    if settings.api_key_env is None:
        return None
    key = environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(f"`api_key_env` of upstream `{name}` names {settings.api_key_env}, which is not set")
    return key


@dataclass(frozen=True, slots=True)
class SmallAnswer:
    """A small answer, whole."""

    status_code: int
    content: bytes
    content_type: str


class Answer:
    """An answer of the engine whose headers have arrived."""

    def __init__(self, response: aiohttp.ClientResponse, stopwatch: Stopwatch, engine: str) -> None:
        self._engine = engine
        self.broken = False
        """Its connection failed before its end."""
        self._response = response
        self._stopwatch = stopwatch
        self.status = response.status
        self.content_type = _content_type(response)

    @property
    def evidence(self) -> bytes | None:
        """The evidence header; None where it is absent. Several are joined, which no reader takes for valid."""
        values = [value for name, value in self._response.raw_headers if name.lower() == _EVIDENCE_HEADER]
        return b"\n".join(values) if values else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; a second call goes on where the first one stopped. Raises UpstreamError."""
        content, stopwatch = self._response.content, self._stopwatch
        while not content.at_eof():
            stopwatch.wait()
            try:
                chunk = await content.read(_SLICE_BYTES)
            except (aiohttp.ClientError, OSError) as error:
                self.broken = True
                raise translate(error, self._engine) from error
            finally:
                stopwatch.go_on()
            if chunk:
                yield chunk
            if len(chunk) == _SLICE_BYTES:
                await asyncio.sleep(0)

    async def read(self) -> bytes:
        """The whole body. Raises UpstreamError."""
        return b"".join([chunk async for chunk in self.chunks()])


class Upstream:
    """vLLM's OpenAI server. Holds the connection pool; close it with `aclose`. `name`: the engine's in the settings.

    Raises ConfigError where the variable that should hold the key is not set.
    """

    def __init__(self, name: str, settings: UpstreamSettings, environ: Mapping[str, str]) -> None:
        self._name = name
        self._settings = settings
        self._replaces_key = settings.api_key_env is not None
        self._key = engine_key(name, settings, environ)
        self._clients: dict[bool, aiohttp.ClientSession] = {}
        """By whether a request gets a connection of its own."""

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def get(self, path: str, authorization: str | None = None, timeout_s: float | None = None) -> SmallAnswer:
        """A small answer, whole. Raises UpstreamError, and ApiError 400 where the Authorization cannot be written."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client().get(self._url(path), headers=self._authorized(authorization)) as response,
            ):
                return SmallAnswer(response.status, await response.read(), _content_type(response))
        except (aiohttp.ClientError, OSError) as error:
            raise translate(error, self._name) from error

    async def status(self, max_age_s: int = 0) -> SmallAnswer:
        """What the engine's workers guard with; with `max_age_s` an older answer will do, while the same guard is on.
        Raises UpstreamError."""
        path = f"{STATUS_PATH}?{STATUS_AGE}={max_age_s}" if max_age_s else STATUS_PATH
        return await self.get(path, timeout_s=_STATUS_TIMEOUT_S)

    @asynccontextmanager
    async def post(
        self,
        path: str,
        body: bytes,
        authorization: str | None,
        request_id: str,
        stopwatch: Stopwatch,
        fresh: bool = False,
        traceparent: str | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request and wait for the head of its answer. Leaving the context early cancels it upstream.

        `fresh`: over a connection of its own, because kept ones may all be dead. Of the client's headers only its
        Authorization goes along. Raises UpstreamError, and ApiError 400 where that header cannot be written.
        """
        headers = self._authorized(authorization)
        headers["content-type"] = "application/json"
        headers["x-request-id"] = request_id
        headers[REQUEST_HEADER] = "1"
        if traceparent is not None:
            headers["traceparent"] = traceparent
        way = _Way(stopwatch)
        try:
            response = await self._client(fresh).post(
                self._url(path), data=body, headers=headers, allow_redirects=False, trace_request_ctx=way
            )
        except (aiohttp.ClientError, OSError) as error:
            raise translate(error, self._name, way) from error
        try:
            yield Answer(response, stopwatch, self._name)
        finally:
            # One whose answer was read to its end has let go of its connection already; another's is of no more use.
            response.close()

    def _client(self, fresh: bool = False) -> aiohttp.ClientSession:
        """Made when it is first needed: it belongs to the event loop that it is made in."""
        if fresh not in self._clients:
            self._clients[fresh] = _session(self._settings, fresh)
        return self._clients[fresh]

    def _url(self, path: str) -> URL:
        return URL(self._settings.url + path, encoded=True)

    def _authorized(self, authorization: str | None) -> dict[str, str]:
        value = f"Bearer {self._key}" if self._replaces_key else authorization
        if not value:
            return {}
        try:
            # As the bytes came: aiohttp writes UTF-8, Starlette read Latin-1.
            return {"authorization": value.encode("latin-1").decode()}
        except UnicodeError:
            raise bad_request("The `Authorization` header is not UTF-8.", "authorization") from None


def _session(settings: UpstreamSettings, fresh: bool) -> aiohttp.ClientSession:
    # How many requests an engine is sent at a time is not for its connections to say.
    if fresh:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
        ),
        headers={"user-agent": "undertow", "accept-encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_BUFFER_BYTES,
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
        trace_configs=[_tracing()],
    )


class _Way:
    """How far a request came, as the HTTP client's trace hooks tell."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.fresh = False
        """Its connection was made for it."""
        self.sent = False
        """Some of it was written: the engine may have begun."""

    @property
    def repeat(self) -> Repeat:
        """Of a request whose connection closed before its answer began."""
        return "safe" if not self.sent else "never" if self.fresh else "once"


def _tracing() -> aiohttp.TraceConfig:
    """Hooks that tell a request's `_Way`, if it has one. What they do not count as waiting is work of this process."""

    async def connecting(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if (way := context.trace_request_ctx) is not None:
            way.stopwatch.wait()

    async def connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if (way := context.trace_request_ctx) is not None:
            way.stopwatch.go_on()
            way.fresh = True

    async def sending(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if (way := context.trace_request_ctx) is not None:
            way.stopwatch.wait()
            way.sent = True

    async def answered(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if (way := context.trace_request_ctx) is not None:
            way.stopwatch.go_on()

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_start.append(connecting)
    tracing.on_connection_create_end.append(connected)
    tracing.on_request_chunk_sent.append(sending)
    tracing.on_request_end.append(answered)
    return tracing


def _content_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("content-type", "application/octet-stream")


def translate(error: Exception, engine: str, way: _Way | None = None) -> UpstreamError:
    """aiohttp's errors by what they mean for a request. Their text can hold a URL, never a body or a key."""
    name = type(error).__name__
    match error:
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            detail = f"no connection to the engine ({name})"
            return UpstreamError("connect", detail, engine=engine, repeat="safe")
        case TimeoutError():
            return UpstreamError("timeout", f"the engine was silent for too long ({name})", engine=engine)
        case aiohttp.InvalidURL():
            return UpstreamError("protocol", f"the request could not be written ({name})", engine=engine)
        case _:
            repeat = way.repeat if way else "never"
            return UpstreamError("cut", f"the engine closed the connection ({name})", engine=engine, repeat=repeat)
