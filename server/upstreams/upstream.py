"""The engine's HTTP side: one pooled client, and the answers that it gives.

async with upstream.post(CHAT.path, body, authorization, request_id, stopwatch) as answer:
    answer.evidence
    async for received in answer.chunks(): ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from guard.errors import ConfigError
from guard.evidence import REQUEST_HEADER, STATUS_AGE, STATUS_PATH
from server.config.upstream import UpstreamSettings
from server.errors import Repeat, UpstreamError
from server.telemetry.stopwatch import Stopwatch

_EVIDENCE_HEADER = REQUEST_HEADER.encode()
_STATUS_TIMEOUT_S = 5.0
# vLLM closes idle connections after 5 s; we let go first, so that no request meets a connection that is just closing.
_KEEP_ALIVE_S = 2.0
_KEPT = 128


class Answer:
    """An answer of the engine whose headers have arrived."""

    def __init__(self, response: httpx.Response, stopwatch: Stopwatch, engine: str) -> None:
        self._engine = engine
        self.broken = False
        """Its connection failed before its end."""
        self._response = response
        self._raw = response.aiter_raw()
        self._stopwatch = stopwatch
        self.status = response.status_code
        self.content_type = response.headers.get("content-type", "application/octet-stream")

    @property
    def evidence(self) -> bytes | None:
        """The evidence header; None where it is absent. Several are joined, which no reader takes for valid."""
        values = [value for name, value in self._response.headers.raw if name.lower() == _EVIDENCE_HEADER]
        return b"\n".join(values) if values else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; a second call goes on where the first one stopped. Raises UpstreamError."""
        while True:
            try:
                with self._stopwatch.waiting():
                    chunk = await anext(self._raw, None)
            except httpx.HTTPError as error:
                self.broken = True
                raise translate(error, self._engine) from error
            if chunk is None:
                return
            yield chunk

    async def read(self) -> bytes:
        """The whole body. Raises UpstreamError."""
        return b"".join([chunk async for chunk in self.chunks()])


class Upstream:
    """vLLM's OpenAI server. Holds the connection pool; close it with `aclose`. `name`: the engine's in the settings.

    Raises ConfigError where the variable that should hold the key is not set.
    """

    def __init__(self, name: str, settings: UpstreamSettings, environ: Mapping[str, str]) -> None:
        self._name = name
        self._replaces_key = settings.api_key_env is not None
        self._key = environ.get(settings.api_key_env or "")
        if self._replaces_key and not self._key:
            raise ConfigError(f"`api_key_env` of upstream `{name}` names {settings.api_key_env}, which is not set")
        self._client = _client(settings, kept=_KEPT)
        self._fresh = _client(settings, kept=0)

    async def aclose(self) -> None:
        await self._client.aclose()
        await self._fresh.aclose()

    async def get(self, path: str, authorization: str | None = None, timeout_s: float | None = None) -> httpx.Response:
        """A small answer, whole. Raises UpstreamError."""
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            return await self._client.get(path, headers=self._authorized(authorization), timeout=timeout)
        except httpx.HTTPError as error:
            raise translate(error, self._name) from error

    async def status(self, max_age_s: int = 0) -> httpx.Response:
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
    ) -> AsyncIterator[Answer]:
        """Send a request and wait for the head of its answer. Leaving the context early cancels it upstream.

        `fresh`: over a connection of its own, because kept ones may all be dead. Of the client's headers only its
        Authorization goes along. Raises UpstreamError.
        """
        headers = self._authorized(authorization)
        headers["content-type"] = "application/json"
        headers["x-request-id"] = request_id
        headers[REQUEST_HEADER] = "1"
        way = _Way(stopwatch)
        client = self._fresh if fresh else self._client
        request = client.build_request("POST", path, content=body, headers=headers, extensions={"trace": way.trace})
        try:
            response = await client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise translate(error, self._name, way) from error
        try:
            yield Answer(response, stopwatch, self._name)
        finally:
            await response.aclose()

    def _authorized(self, authorization: str | None) -> httpx.Headers:
        value = f"Bearer {self._key}" if self._replaces_key else authorization
        # As the bytes came: a header need not be ASCII.
        return httpx.Headers({"authorization": value} if value else {}, encoding="latin-1")


def _client(settings: UpstreamSettings, kept: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=settings.url,
        # Proxies and certificates of the environment are for the internet; the engine is next door.
        trust_env=False,
        timeout=httpx.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=kept, keepalive_expiry=_KEEP_ALIVE_S),
        headers={"user-agent": "undertow", "accept-encoding": "identity"},
    )


class _Way:
    """How far a request came, as the HTTP client's trace hook tells."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self.fresh = False
        """Its connection was made for it."""
        self.sent = False
        """All of it was written: the engine may have begun."""

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self.fresh = True
        elif event == "http11.send_request_body.complete":
            self.sent = True
        await self._stopwatch.trace(event, info)

    @property
    def repeat(self) -> Repeat:
        """Of a request whose connection closed before its answer began."""
        return "safe" if not self.sent else "never" if self.fresh else "once"


def translate(error: httpx.HTTPError, engine: str, way: _Way | None = None) -> UpstreamError:
    """httpx's errors by what they mean for a request. Their text can hold a URL, never a body or a key."""
    name = type(error).__name__
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
            detail = f"no connection to the engine ({name})"
            return UpstreamError("connect", detail, engine=engine, repeat="safe")
        case httpx.TimeoutException():
            return UpstreamError("timeout", f"the engine was silent for too long ({name})", engine=engine)
        case httpx.LocalProtocolError():
            return UpstreamError("protocol", f"the request could not be written ({name})", engine=engine)
        case _:
            repeat = way.repeat if way else "never"
            return UpstreamError("cut", f"the engine closed the connection ({name})", engine=engine, repeat=repeat)
