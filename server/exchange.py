"""One completion request, from the client's body to the last byte of its answer.

The way of a request: read the body, know the engine's handshake, send it on, judge the evidence, answer. Whatever
happens, `_conclude` counts it once.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guard.errors import EngineError
from guard.policy import Policy
from server.assessment import Assessor, Usage, choices_of
from server.body import read_body
from server.disconnect import ClientGone, unless_gone
from server.errors import (
    ApiError,
    GuardFailure,
    UpstreamError,
    blocked_prompt,
    guard_unavailable,
    upstream_unavailable,
)
from server.handshake import Handshake, HandshakeKeeper
from server.incidents import report, report_failure
from server.logs import LOGGER, log
from server.metrics import Metrics, Outcome
from server.protocol import Call, Endpoint, blocked_choice, new_head, read_call
from server.settings import Limits
from server.sse import EventParser
from server.stopwatch import Stopwatch
from server.stream import StreamGuard
from server.upstream import Answer, Upstream

_DRAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Gateway:
    """What every exchange shares."""

    policy: Policy
    limits: Limits
    upstream: Upstream
    keeper: HandshakeKeeper
    metrics: Metrics


class Exchange(Response):
    """The answer to one request: an ASGI app that does the work when it is called."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint, request: Request, request_id: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._endpoint = endpoint
        self._request = request
        self._request_id = request_id
        self._stopwatch = Stopwatch()
        self._call: Call | None = None
        self._assessor: Assessor | None = None
        self._outcome: Outcome = "guard_failed"
        self._status = 0
        self._started = False
        self._answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._gateway.metrics.inflight.track_inprogress():
            try:
                await self._exchange(receive, send)
            finally:
                self._conclude()

    async def _exchange(self, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(self._request, self._gateway.limits)
            self._stopwatch = Stopwatch()
            self._call = read_call(self._endpoint, body)
            await unless_gone(receive, self._serve(self._call, send))
        except (ClientGone, ClientDisconnect):
            if not self._answered:
                self._outcome = "client_gone"
        except ApiError as error:
            self._outcome = "client_error"
            await self._send_error(send, error)

    async def _serve(self, call: Call, send: Send) -> None:
        try:
            handshake = await self._handshake()
            assessor = self._assessor = Assessor(call, self._gateway.policy, handshake)
            if handshake is None and assessor.enforcing:
                await self._refuse_unjudged(send, assessor.opening(None))
                return
            body = call.upstream_body(self._gateway.policy, assessor.reserved_token_id)
            authorization = self._request.headers.get("authorization")
            async with self._gateway.upstream.post(
                self._endpoint.path, body, authorization, self._request_id, self._stopwatch
            ) as answer:
                if answer.status != 200:
                    await self._answer_error(call, assessor, answer, send)
                elif call.stream:
                    await self._answer_stream(call, assessor, answer, send)
                else:
                    await self._answer_full(call, assessor, answer, send)
        except UpstreamError as error:
            self._upstream_failed(error)
            self._outcome = "upstream_error"
            await self._send_error(send, upstream_unavailable(error))
        except ApiError:
            raise
        except Exception:  # noqa: BLE001 - fail closed: nothing more of the answer is sent
            LOGGER.exception("fault", extra={"fields": {"request_id": self._request_id}})
            if self._assessor is not None:
                self._assessor.failure = GuardFailure("internal", "a fault in the server")
            self._outcome = "guard_failed"
            await self._send_error(send, guard_unavailable())

    async def _handshake(self) -> Handshake | None:
        """None where the engine is up but its guard is not what it should be."""
        try:
            with self._stopwatch.waiting():
                return await self._gateway.keeper.get()
        except EngineError:
            return None

    async def _answer_full(self, call: Call, assessor: Assessor, answer: Answer, send: Send) -> None:
        content = await answer.read()
        body, choices = _parse_full(content)
        failure = assessor.final(answer.evidence, Usage.read(body.get("usage")))
        if failure is None and choices is None:
            failure = assessor.fail(GuardFailure("response_invalid", "the answer has no choices"))
        for choice in choices or ():
            failure = failure or assessor.stopped_unexplained(choice["index"], choice.get("stop_reason"))
        if failure is not None and assessor.enforcing:
            await self._refuse_unjudged(send, failure)
            return
        if assessor.prompt_blocked:
            await self._refuse_prompt(send)
            return
        if assessor.blocked and choices is not None:
            body["choices"] = [_without_blocked(call, assessor, choice) for choice in choices]
            content = json.dumps(body).encode()
        self._judge_outcome(assessor)
        await self._send_full(send, 200, content, answer.content_type, {"x-undertow-action": assessor.told})

    async def _answer_stream(self, call: Call, assessor: Assessor, answer: Answer, send: Send) -> None:
        guard, parser = StreamGuard(call, assessor), EventParser()
        try:
            async for received in answer.chunks():
                released = [part for event in parser.feed(received) for part in guard.feed(event)]
                if guard.refusal is not None:
                    await self._refuse_opening(send, assessor, guard.refusal)
                    return
                if guard.opened and not self._started:
                    await self._start_stream(send, assessor)
                if released:
                    await self._send_part(send, b"".join(released))
                if guard.closed:
                    break
        except UpstreamError as error:
            if not self._started:
                raise
            self._upstream_failed(error)
        if not self._started:
            raise UpstreamError("cut", "the engine ended a stream before its first event")
        if not guard.closed:
            await self._send_part(send, b"".join(guard.cut()))
        self._judge_outcome(assessor, broken=guard.broken)
        self._answered = True
        if self._outcome not in ("guard_failed", "upstream_error"):
            await _drain(answer)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer_error(self, call: Call, assessor: Assessor, answer: Answer, send: Send) -> None:
        """The engine answered with an error. Where sequences had begun, evidence says whether a block made it."""
        content = await answer.read()
        evidence = answer.evidence
        failure = assessor.opening(evidence) if evidence is not None else None
        if failure is not None and failure.kind == "unscorable" and assessor.enforcing:
            await self._refuse_unjudged(send, failure)
        elif assessor.prompt_blocked or (assessor.blocked and call.stream):
            await self._refuse_prompt(send)
        elif assessor.blocked:
            self._outcome = "blocked_output"
            body = json.dumps(_all_blocked(call, assessor)).encode()
            await self._send_full(send, 200, body, "application/json", {"x-undertow-action": "block"})
        else:
            assessor.failure = None  # Nothing was generated, so nothing went unjudged.
            self._outcome = "upstream_rejected" if answer.status < 500 else "upstream_error"
            if answer.status >= 500:
                self._upstream_failed(UpstreamError("status", f"the engine answered {answer.status}"))
            await self._send_full(send, answer.status, content, answer.content_type)

    async def _refuse_opening(self, send: Send, assessor: Assessor, refusal: ApiError) -> None:
        if assessor.failure is not None and assessor.enforcing:
            await self._refuse_unjudged(send, assessor.failure)
        else:
            self._outcome = "blocked_prompt"
            await self._send_error(send, refusal, {"x-undertow-action": "block"})

    async def _refuse_prompt(self, send: Send) -> None:
        self._outcome = "blocked_prompt"
        await self._send_error(send, blocked_prompt(self._endpoint.prompt_field), {"x-undertow-action": "block"})

    async def _refuse_unjudged(self, send: Send, failure: GuardFailure | None) -> None:
        self._outcome = "guard_failed"
        if failure is not None and failure.kind == "fingerprint":
            self._gateway.keeper.drop(failure.detail)
        await self._send_error(send, guard_unavailable())

    def _judge_outcome(self, assessor: Assessor, broken: bool = False) -> None:
        if assessor.failure is not None and assessor.failure.kind == "fingerprint":
            self._gateway.keeper.drop(assessor.failure.detail)
        if broken:
            self._outcome = "upstream_error"
        elif assessor.failure is not None:
            self._outcome = "guard_failed" if assessor.enforcing else "unguarded"
        elif assessor.blocked:
            self._outcome = "blocked_output"
        else:
            self._outcome = "flagged" if assessor.told == "flag" else "allowed"

    def _upstream_failed(self, error: UpstreamError) -> None:
        self._gateway.metrics.upstream_failed(error.kind)
        log(logging.ERROR, "upstream error", request_id=self._request_id, kind=error.kind, detail=error.detail)
        if error.kind in ("connect", "cut"):
            # It may come back with another bank.
            self._gateway.keeper.drop(error.detail)

    async def _start_stream(self, send: Send, assessor: Assessor) -> None:
        headers = {"x-undertow-action": assessor.told, "cache-control": "no-cache"}
        await self._start(send, 200, "text/event-stream; charset=utf-8", headers)

    async def _send_part(self, send: Send, part: bytes) -> None:
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _send_error(self, send: Send, error: ApiError, headers: dict[str, str] | None = None) -> None:
        if self._answered:
            return
        if self._started:
            part = error.sse() + b"data: [DONE]\n\n"
            await send({"type": "http.response.body", "body": part, "more_body": False})
            return
        headers = {**error.headers, **(headers or {})}
        await self._send_full(send, error.status, error.body(), "application/json", headers)

    async def _send_full(
        self, send: Send, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        await self._start(send, status, content_type, {**(headers or {}), "content-length": str(len(body))})
        self._answered = True
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send, status: int, content_type: str, headers: dict[str, str]) -> None:
        self._started = True
        self._status = status
        if self._call is not None:
            self._gateway.metrics.added_latency(self._stopwatch.added)
        pairs = {"content-type": content_type, "x-request-id": self._request_id, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    def _conclude(self) -> None:
        """Count and log the request, once."""
        metrics, call, assessor = self._gateway.metrics, self._call, self._assessor
        metrics.requested(self._endpoint.name, self._outcome)
        if call is not None and assessor is not None:
            metrics.judged(assessor.records)
            for record in assessor.records:
                if record.action != "allow":
                    report(call, self._request_id, record)
            if assessor.failure is not None and self._outcome in ("guard_failed", "unguarded"):
                metrics.failed(assessor.failure.kind, self._gateway.policy.mode)
                report_failure(call, self._request_id, assessor.failure, self._gateway.policy.mode)
        log(
            logging.INFO,
            "request",
            request_id=self._request_id,
            endpoint=self._endpoint.name,
            outcome=self._outcome,
            status=self._status,
            stream=call.stream if call else None,
            duration_s=round(self._stopwatch.total, 4),
        )


def _parse_full(content: bytes) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """A full answer and its choices; an empty body and None where it is not of the shape that OpenAI says."""
    try:
        body = json.loads(content)
    except ValueError:
        return {}, None
    return (body, choices_of(body)) if isinstance(body, dict) else ({}, None)


def _without_blocked(call: Call, assessor: Assessor, choice: dict[str, Any]) -> dict[str, Any]:
    if choice["index"] not in assessor.blocked:
        return choice
    message = choice.get("message")
    role = message.get("role") if isinstance(message, dict) else None
    return blocked_choice(call.endpoint, choice["index"], role if isinstance(role, str) else "assistant")


def _all_blocked(call: Call, assessor: Assessor) -> dict[str, Any]:
    """The answer where a block made the engine fail: it sent no text for any choice. Usage is the evidence's."""
    records = assessor.records
    prompt = sum(record.prompt_tokens for record in records if record.choice_index == 0)
    completion = sum(max(0, record.tokens_scored + 1 - record.prompt_tokens) for record in records)
    return {
        **new_head(call),
        "choices": [blocked_choice(call.endpoint, index) for index in range(call.prompts * call.n)],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


async def _drain(answer: Answer) -> None:
    """Read what follows `[DONE]`, so that the connection can be used again."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for _ in answer.chunks():
                pass
    except (TimeoutError, UpstreamError):
        pass
