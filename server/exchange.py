"""One completion request, from the client's body to the last byte of its answer.

The way of a request: read the body, know the engine's handshake, send it on, judge the evidence, answer. Whatever
happens, `_conclude` counts it once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guard.errors import EngineError
from server import telling
from server.access.limiter import Client, Limiter, Slot
from server.assessment import Assessor, Told
from server.body import read_body
from server.disconnect import ClientGone, unless_gone
from server.drain import Drain
from server.errors import (
    ApiError,
    GuardFailure,
    RateLimited,
    ShuttingDown,
    UpstreamError,
    UpstreamKind,
    guard_unavailable,
    upstream_unavailable,
)
from server.in_force import Live
from server.incidents.incidents import Incidents
from server.incidents.report import report, report_failure
from server.protocols.openai import Call
from server.protocols.protocol import Protocol
from server.reply import JSON, Reply
from server.ruling import Ruling, rule
from server.shadow import compare
from server.sse import EventParser
from server.stream import StreamGuard, evidence_of
from server.telemetry.logs import LOGGER, log
from server.telemetry.metrics import BypassReason, Metrics, Outcome
from server.telemetry.names import model_label
from server.telemetry.stopwatch import HoldBackTimer, Stopwatch
from server.telemetry.traces import Traces
from server.upstreams.fleet import Asked, Fleet, Question
from server.upstreams.upstream import Answer
from server.whole import judge_answer, judge_error

_PASSED: Mapping[Told, Outcome] = {"flag": "flagged", "steer": "steered"}
_DRAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Gateway:
    """What every exchange shares."""

    live: Live
    fleet: Fleet
    drain: Drain
    metrics: Metrics
    limiter: Limiter = field(default_factory=Limiter)
    incidents: Incidents = field(default_factory=Incidents)
    traces: Traces = field(default_factory=Traces)


class Exchange(Response):
    """The answer to one request: an ASGI app that does the work when it is called."""

    def __init__(self, gateway: Gateway, protocol: Protocol, request: Request, request_id: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._protocol = protocol
        self._endpoint = protocol.endpoint
        self._request = request
        self._request_id = request_id
        self._force = gateway.live.now
        self._stopwatch = Stopwatch()
        self._trace = gateway.traces.begin(self._endpoint.name, request.headers)
        self._client = Client()
        self._slot: Slot | None = None
        self._call: Call | None = None
        self._assessor: Assessor | None = None
        self._asked: Asked | None = None
        self._outcome: Outcome = "guard_failed"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, self._protocol, self._request_id, self._measure)
        with self._gateway.metrics.inflight.track_inprogress():
            try:
                await self._exchange(receive, reply)
            finally:
                self._conclude(reply.status)

    async def _exchange(self, receive: Receive, reply: Reply) -> None:
        try:
            # Before the body is read: it costs whoever has no key nothing to send.
            self._client = self._force.door.admit(self._protocol.authorization(self._request.headers))
            with self._gateway.limiter.admit(self._client) as self._slot:
                await self._admitted(self._slot, receive, reply)
        except (ClientGone, ClientDisconnect):
            if not reply.complete:
                self._outcome = "client_gone"
        except asyncio.CancelledError:
            # The server is shutting down and has waited long enough.
            if not reply.complete:
                self._outcome = "client_gone"
            raise
        except ShuttingDown as error:
            if not reply.complete:
                self._outcome = "shut_down"
            await reply.error(error)
        except ApiError as error:
            self._outcome = "unauthorized" if error.status == 401 else "client_error"
            if isinstance(error, RateLimited):
                self._outcome = "rate_limited"
                self._gateway.metrics.limited(error.limit)
            await reply.error(error)

    async def _admitted(self, slot: Slot, receive: Receive, reply: Reply) -> None:
        body = await read_body(self._request, self._force.limits)
        self._stopwatch = Stopwatch()
        self._call = self._protocol.read(body, self._force.terms)
        if self._call.stream:
            slot.streams()
        reply.always = slot.headers
        model = self._call.fields.get("model")
        ruling = rule(self._force.rulings, self._endpoint.name, model, self._client.tenant)
        await unless_gone(receive, self._gateway.drain.bounded(self._serve(self._call, ruling, reply)))

    async def _serve(self, call: Call, ruling: Ruling, reply: Reply) -> None:
        try:
            async with self._gateway.fleet.post(self._question(call, ruling)) as asked:
                self._asked, answer = asked, asked.answer
                identity = self._gateway.incidents.identity()
                assessor = self._assessor = Assessor(call, ruling, asked.handshake, asked.knows, identity)
                if answer.status != 200:
                    await self._answer_error(call, assessor, answer, reply)
                elif call.stream:
                    await self._answer_stream(call, assessor, answer, reply)
                else:
                    await self._answer_whole(call, assessor, answer, reply)
                self._trace.answered(asked.engine.name, answer.status)
        except UpstreamError as error:
            self._gateway.fleet.failed(error, self._request_id)
            self._outcome = "upstream_error"
            await reply.error(upstream_unavailable(error))
        except EngineError:
            # An engine is there, but its guard is not what it should be.
            assessor = self._assessor = Assessor(call, ruling, None)
            assessor.opening(None)
            await self._refuse(assessor, guard_unavailable(), reply)
        except ApiError:
            raise
        except Exception:  # noqa: BLE001 - fail closed: nothing more of the answer is sent
            LOGGER.exception("fault", extra={"fields": {"request_id": self._request_id}})
            self._assessor = self._assessor or Assessor(call, ruling, None)
            self._assessor.failure = GuardFailure("internal", "a fault in the server")
            self._outcome = "guard_failed"
            await reply.error(guard_unavailable())

    def _question(self, call: Call, ruling: Ruling) -> Question:
        return Question(
            self._endpoint.engine_path,
            call.fields.get("model"),
            ruling,
            lambda handshake: call.upstream_body(ruling.policy, handshake.reserved_token_id if handshake else None),
            None if self._force.door.locked else self._protocol.authorization(self._request.headers),
            self._request_id,
            self._stopwatch,
            self._trace.asks(),
        )

    async def _answer_whole(self, call: Call, assessor: Assessor, answer: Answer, reply: Reply) -> None:
        content = await answer.read()
        await self._catch_up(answer.evidence)
        released = judge_answer(call, assessor, answer.evidence, content)
        if isinstance(released, ApiError):
            await self._refuse(assessor, released, reply)
            return
        await self._release(call, assessor, released, reply, answer.content_type)

    async def _answer_error(self, call: Call, assessor: Assessor, answer: Answer, reply: Reply) -> None:
        content = await answer.read()
        await self._catch_up(answer.evidence)
        released = judge_error(call, assessor, answer.evidence, content)
        if isinstance(released, ApiError):
            await self._refuse(assessor, released, reply)
        elif released is not None:
            await self._release(call, assessor, released, reply)
        else:
            self._engine_refused(assessor, answer.status)
            written = self._protocol.engine_error(answer.status, content)
            await reply.whole(answer.status, written, answer.content_type if written is content else JSON)

    async def _release(self, call: Call, assessor: Assessor, released: bytes, reply: Reply, kind: str = JSON) -> None:
        """A whole answer that was judged."""
        written = self._protocol.whole(call, released if call.asked else telling.in_answer(assessor, released))
        self._settle(assessor)
        await reply.whole(200, written, kind, telling.headers(assessor))

    async def _answer_stream(self, call: Call, assessor: Assessor, answer: Answer, reply: Reply) -> None:
        guard, parser = StreamGuard(call, assessor), EventParser()
        held = HoldBackTimer(guard, self._gateway.metrics.held_back)
        try:
            async for received in answer.chunks():
                released: list[bytes] = []
                for event in parser.feed(received):
                    if (evidence := evidence_of(event)) is not None:
                        await self._catch_up(evidence)
                    released += guard.feed(event)
                    if guard.refusal is not None:
                        await self._refuse(assessor, guard.refusal, reply)
                        return
                    if guard.opened and not reply.started:
                        # As known now, whatever else came in the same breath.
                        headers = telling.headers(assessor, begins=True)
                        await reply.begin_stream(self._protocol.stream(call), headers)
                held.look()
                if released:
                    await reply.part(b"".join(released))
                if guard.closed:
                    break
        except UpstreamError as error:
            if not reply.started:
                raise
            self._gateway.fleet.failed(error, self._request_id)
        if not reply.started:
            raise self._error("cut", "the engine ended a stream before its first event")
        if not guard.closed:
            await reply.part(b"".join(guard.cut()))
        self._settle(assessor, guard.broken)
        reply.complete = True
        if self._outcome not in ("guard_failed", "upstream_error"):
            await _drain(answer)
        await reply.end()

    async def _catch_up(self, evidence: bytes | None) -> None:
        """Before evidence is judged: what guards may have been changed since the request began."""
        if evidence is not None and self._asked is not None:
            with self._stopwatch.waiting():
                await self._asked.engine.keeper.catch_up(evidence)

    async def _refuse(self, assessor: Assessor, refusal: ApiError, reply: Reply) -> None:
        """Answer with an error instead of what the engine sent."""
        headers: dict[str, str] = {}
        if refusal.code == "content_filter":
            self._outcome = "blocked_prompt"
            headers = telling.headers(assessor) | {"x-undertow-action": "block"}
        elif refusal.code == "guard_unavailable":
            self._outcome = "guard_failed"
            self._doubt_engine(assessor)
        else:
            self._engine_refused(assessor, refusal.status)
        await reply.error(refusal, headers)

    def _settle(self, assessor: Assessor, broken: bool = False) -> None:
        """The outcome of an answer that was released."""
        self._doubt_engine(assessor)
        if broken:
            self._outcome = "upstream_error"
        elif assessor.failure is not None:
            self._outcome = "guard_failed" if assessor.enforcing else "unguarded"
        elif assessor.blocked:
            self._outcome = "blocked_prompt" if assessor.prompt_blocked else "blocked_output"
        else:
            self._outcome = _PASSED.get(assessor.told, "allowed")

    def _engine_refused(self, assessor: Assessor, status: int) -> None:
        """The outcome of an error that the engine answered with."""
        assessor.failure = None  # Nothing was generated, so nothing went unjudged.
        self._outcome = "upstream_rejected" if status < 500 else "upstream_error"
        if status >= 500:
            self._gateway.fleet.failed(self._error("status", f"the engine answered {status}"), self._request_id)

    @property
    def _engine(self) -> str | None:
        return self._asked.engine.name if self._asked else None

    def _error(self, kind: UpstreamKind, detail: str) -> UpstreamError:
        return UpstreamError(kind, detail, engine=self._engine)

    def _doubt_engine(self, assessor: Assessor) -> None:
        if assessor.failure is not None and self._asked is not None:
            self._asked.engine.unjudged(assessor.failure)

    def _known_models(self) -> frozenset[str]:
        """Whose names may become labels."""
        return self._force.models | self._gateway.fleet.models

    def _measure(self) -> None:
        """Called right before the first byte of the answer."""
        if self._call is not None:
            self._gateway.metrics.added_latency(self._stopwatch.added)

    def _conclude(self, status: int) -> None:
        """Count and log the request, once."""
        metrics, call, assessor = self._gateway.metrics, self._call, self._assessor
        metrics.requested(self._endpoint.name, self._outcome)
        model = model_label(call.fields.get("model") if call else None, self._known_models())
        metrics.asked(self._client.tenant, model, self._outcome)
        if self._slot is not None and assessor is not None:
            self._slot.spend(assessor.tokens)
        if call is not None and assessor is not None:
            metrics.judged(assessor.records)
            metrics.shadowed(assessor.ruling.name, compare(assessor.records, assessor.ruling.shadow))
            metrics.evaluation(assessor.seconds)
            if self._outcome == "unguarded":
                metrics.bypassed(_bypass(assessor.ruling))
            for record in assessor.records:
                metrics.flagged(self._client.tenant, model, record)
                if record.action != "allow":
                    report(call, self._request_id, record)
            self._gateway.incidents.keep(
                call, assessor, self._client, self._request_id, self._engine, self._force.hash_key
            )
            if assessor.failure is not None and self._outcome in ("guard_failed", "unguarded"):
                metrics.failed(assessor.failure.kind, assessor.ruling.mode)
                passed = self._outcome == "unguarded"
                report_failure(call, self._request_id, assessor.failure, assessor.ruling.mode, passed)
        coverage = assessor.coverage if assessor else None
        self._trace.end(
            {"undertow.request_id": self._request_id, "undertow.outcome": self._outcome, "undertow.model": model}
            | {"undertow.tenant": self._client.tenant, "http.response.status_code": status or None},
            {"undertow.judge.seconds": assessor.seconds, "undertow.policy": assessor.ruling.name} if assessor else None,
        )
        log(
            logging.INFO,
            "request",
            request_id=self._request_id,
            endpoint=self._endpoint.name,
            outcome=self._outcome,
            status=status,
            stream=call.stream if call else None,
            policy=assessor.ruling.name if assessor else None,
            tenant=self._client.tenant,
            key=self._client.key,
            duration_s=round(self._stopwatch.total, 4),
            tokens_needed=coverage.needed if coverage else None,
            tokens_scored=coverage.scored if coverage else None,
        )


def _bypass(ruling: Ruling) -> BypassReason:
    """Why a request passed that nobody judged."""
    if ruling.on_error == "open":
        return "on_error_open"
    return ruling.mode


async def _drain(answer: Answer) -> None:
    """Read what follows `[DONE]`, so that the connection can be used again."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for _ in answer.chunks():
                pass
    except (TimeoutError, UpstreamError):
        pass
