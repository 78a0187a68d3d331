"""Evidence in vLLM's own HTTP responses. Give it to vLLM as `--middleware guard.engine.middleware.EvidenceMiddleware`.

A request that asks for evidence (`x-undertow-evidence: 1`) gets it in the answer: in a header of a full response; in a
stream as an SSE comment before the first chunk, before each chunk that ends a choice, and before `[DONE]`. Evidence
that rides the response needs no second connection, survives load balancers, and cannot be taken for another request's.
`GET /undertow/status` says what every worker guards with; `POST /undertow/reload` changes it, for whoever has the admin
token, and does not exist where there is none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from time import monotonic
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse

from guard.control import RELOAD_PATH, admin_token
from guard.engine.channel import EvidenceClient
from guard.engine.reload import ReloadEndpoint
from guard.errors import EvidenceError
from guard.evidence import (
    REQUEST_HEADER,
    SILENT,
    STATUS_AGE,
    STATUS_PATH,
    STREAM_PREFIX,
    Evidence,
    Status,
    WorkerStatus,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Under vLLM's own logger: its API process shows no other.
log = logging.getLogger("vllm.undertow")

GENERATING = ("/v1/chat/completions", "/v1/completions")
DONE = b"data: [DONE]"
ENDS_A_CHOICE = b'"finish_reason":"'
"""In a chunk that ends a choice, and in no other: a text's own quotes are escaped."""
STATUS_TIMEOUT_S = 5.0
PING_TIMEOUT_S = 1.0
"""How long the status waits for the evidence channel; it answers from a thread of its own, busy engine or not."""
_UNAVAILABLE = {
    "error": {
        "message": "the guard's workers do not answer",
        "type": "server_error",
        "param": None,
        "code": "guard_unavailable",
    }
}


class EvidenceMiddleware:
    """Pure ASGI, so that streams pass through chunk by chunk."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._client: EvidenceClient | None = None
        self._told: tuple[float, Status] | None = None
        self._running = 0
        """Requests that the engine may be at work for."""
        self._ended = 0
        """How many it has been."""
        # Raises ConfigError: an engine whose token cannot be used does not start.
        token = admin_token(os.environ)
        self._reload = None if token is None else ReloadEndpoint(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == STATUS_PATH and scope["method"] == "GET":
            await self._status(scope, receive, send)
        elif self._reload and (scope["type"], scope.get("path"), scope.get("method")) == ("http", RELOAD_PATH, "POST"):
            await self._reload(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST":
            self._running += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self._running -= 1
                self._ended += 1
                self._told = None
        else:
            await self._app(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in GENERATING and REQUEST_HEADER in Headers(scope=scope):
            await self._generate(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _status(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            status = await self._told_before(scope) or await self._ask_status(scope)
            response = JSONResponse(status.model_dump(mode="json"))
        except Exception as error:  # noqa: BLE001  (whatever went wrong in the engine, the asker must hear of it)
            log.error("status: %s", error)
            response = JSONResponse({"error": f"the workers gave no status: {type(error).__name__}"}, status_code=503)
        await response(scope, receive, send)

    async def _told_before(self, scope: Scope) -> Status | None:
        """The last status, where it is young enough for the asker, the engine has had nothing to do since, and the same
        guard is on. The evidence channel says so: its thread wakes no worker."""
        asked = QueryParams(scope["query_string"]).get(STATUS_AGE, "0")
        if self._told is None or self._running or not asked.isdecimal() or monotonic() - self._told[0] > int(asked):
            return None
        status, now = self._told[1], await self._gives_evidence(scope)
        guards = {(worker.fingerprint or "", worker.calibration or "") for worker in status.workers}
        return status if now is not None and guards == {(now.fingerprint, now.calibration)} else None

    async def _ask_status(self, scope: Scope) -> Status:
        asked, ended = monotonic(), self._ended
        workers = [answer["worker"] for answer in await self._ask_workers(scope)]
        answers = await self._gives_evidence(scope)
        status = Status(
            workers=tuple(WorkerStatus.model_validate(worker) for worker in workers),
            channel="answers" if answers else "silent",
        )
        # What ran meanwhile may have changed what its workers counted.
        self._told = None if self._running or self._ended != ended else (asked, status)
        return status

    async def _gives_evidence(self, scope: Scope) -> Evidence | None:
        """What the worker says of a request that there is not: what guards. None: it gives no evidence."""
        try:
            client = await self._channel(scope)
            async with asyncio.timeout(PING_TIMEOUT_S):
                return await client.ask("")
        except (ValueError, TimeoutError, EvidenceError):  # a ValueError: there is not one rank that speaks for all
            return None

    async def _ask_workers(self, scope: Scope) -> list[dict[str, Any]]:
        engine = scope["app"].state.engine_client
        return [json.loads(answer) for answer in await engine.collective_rpc("undertow_status", STATUS_TIMEOUT_S)]

    async def _channel(self, scope: Scope) -> EvidenceClient:
        """The channel to the worker, opened at the first request: its address is the worker's to say."""
        if self._client is None:
            # The rank whose output vLLM takes is the one that has it.
            [address] = [told for answer in await self._ask_workers(scope) if (told := answer["channel"]) is not None]
            if self._client is None:  # another request may have been faster
                self._client = EvidenceClient(address)
        return self._client

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request under an id that only this process knows, and add what the worker says of it."""
        try:
            client = await self._channel(scope)
        except Exception as error:  # noqa: BLE001  (whatever went wrong in the engine, nothing passes unjudged)
            log.error("no evidence channel: %s", error)
            response = JSONResponse(_UNAVAILABLE, status_code=503)
            await response(scope, receive, send)
            return
        key = uuid.uuid4().hex
        headers = MutableHeaders(scope=scope)
        headers["x-request-id"] = key
        answer = _Answer(client, key, send)
        await self._app(scope, receive, answer.send)


class _Answer:
    """One response on its way out."""

    def __init__(self, client: EvidenceClient, key: str, send: Send) -> None:
        self._client, self._key, self._send = client, key, send
        self._start: Message | None = None
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
            # Held until the first body message: only then has the engine anything to say.
            self._start = message
            return
        if message["type"] == "http.response.body" and self._start is not None:
            start, self._start = self._start, None
            evidence = await self._evidence()
            if self._streams:
                await self._send(start)
                await self._comment(evidence)
            else:
                if evidence is not None:
                    MutableHeaders(raw=start["headers"])[REQUEST_HEADER] = evidence
                await self._send(start)
        elif self._streams and _ends(message.get("body", b"")):
            await self._comment(await self._evidence())
        await self._send(message)

    async def _evidence(self) -> str | None:
        """What the worker knows now, as it is sent. None: it knows no such request, and the answer goes without
        evidence, which its reader takes as a failure."""
        try:
            evidence = await self._client.ask(self._key)
        except EvidenceError as error:
            log.error("no evidence for a request: %s", error)
            return SILENT
        return evidence.to_json() if evidence.records else None

    async def _comment(self, evidence: str | None) -> None:
        if evidence is not None:
            body = f"{STREAM_PREFIX}{evidence}\n\n".encode()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})


def _ends(body: bytes) -> bool:
    return body.startswith(DONE) or ENDS_A_CHOICE in body
