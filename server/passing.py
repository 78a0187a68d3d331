"""A request that is passed to an engine without being judged, because nothing is generated: see `protocols.unguarded`.

It is counted as `unguarded`, and never reaches an endpoint that generates: where it goes is a path of our own.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.access.limiter import Client
from server.body import read_body
from server.disconnect import ClientGone, unless_gone
from server.errors import ApiError, RateLimited, ShuttingDown, UpstreamError, upstream_unavailable
from server.exchange import Gateway
from server.protocols.known import CHAT_COMPLETIONS
from server.protocols.openai import parse
from server.protocols.unguarded import Unguarded
from server.reply import Reply
from server.telemetry.logs import LOGGER, log
from server.telemetry.metrics import Outcome
from server.telemetry.names import model_label
from server.telemetry.stopwatch import Stopwatch
from server.upstreams.fleet import Question


class Passing(Response):
    """The answer to one such request: an ASGI app that does the work when it is called."""

    def __init__(self, gateway: Gateway, endpoint: Unguarded, request: Request, request_id: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._endpoint = endpoint
        self._request = request
        self._request_id = request_id
        self._force = gateway.live.now
        self._authorization = CHAT_COMPLETIONS.authorization(request.headers)
        self._trace = gateway.traces.begin(endpoint.name, request.headers)
        self._client = Client()
        self._model: object = None
        self._outcome: Outcome = "upstream_error"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, CHAT_COMPLETIONS, self._request_id, lambda: None)
        try:
            await self._pass(receive, reply)
        finally:
            metrics = self._gateway.metrics
            metrics.requested(self._endpoint.name, self._outcome)
            model = model_label(self._model, self._force.models | self._gateway.fleet.models)
            metrics.asked(self._client.tenant, model, self._outcome)
            if self._outcome == "unguarded":
                metrics.bypassed("endpoint")
            self._trace.end(
                {"undertow.request_id": self._request_id, "undertow.outcome": self._outcome, "undertow.model": model}
                | {"undertow.tenant": self._client.tenant, "http.response.status_code": reply.status or None},
                None,
            )
            log(
                logging.INFO,
                "request",
                request_id=self._request_id,
                endpoint=self._endpoint.name,
                outcome=self._outcome,
                status=reply.status,
                tenant=self._client.tenant,
                key=self._client.key,
            )

    async def _pass(self, receive: Receive, reply: Reply) -> None:
        try:
            self._client = self._force.door.admit(self._authorization)
            with self._gateway.limiter.admit(self._client) as slot:
                reply.always = slot.headers
                fields = self._endpoint.accepted.accept(parse(await read_body(self._request, self._force.limits)))
                self._model = fields.get("model")
                body = json.dumps(fields, separators=(",", ":")).encode()
                asking = self._ask(self._model, body, reply)
                await unless_gone(receive, self._gateway.drain.bounded(asking))
        except (ClientGone, ClientDisconnect):
            self._outcome = self._outcome if reply.complete else "client_gone"
        except asyncio.CancelledError:
            self._outcome = self._outcome if reply.complete else "client_gone"
            raise
        except ShuttingDown as error:
            self._outcome = "shut_down"
            await reply.error(error)
        except ApiError as error:
            self._outcome = "unauthorized" if error.status == 401 else "client_error"
            if isinstance(error, RateLimited):
                self._outcome = "rate_limited"
                self._gateway.metrics.limited(error.limit)
            await reply.error(error)
        except UpstreamError as error:
            self._gateway.fleet.failed(error, self._request_id)
            self._outcome = "upstream_error"
            await reply.error(upstream_unavailable(error))
        except Exception:  # noqa: BLE001 - the client is told, the log has its place
            LOGGER.exception("fault", extra={"fields": {"request_id": self._request_id}})
            self._outcome = "upstream_error"
            await reply.error(ApiError(500, "A fault in the server.", type="server_error", code="internal_error"))

    async def _ask(self, model: object, body: bytes, reply: Reply) -> None:
        # Whoever answers will do: there is no evidence to hold against a handshake.
        default = self._force.rulings.default
        ruling = replace(default, policy=default.policy.model_copy(update={"mode": "off"}))
        question = Question(
            self._endpoint.path,
            model,
            ruling,
            lambda _: body,
            None if self._force.door.locked else self._authorization,
            self._request_id,
            Stopwatch(),
            self._trace.asks(),
        )
        async with self._gateway.fleet.post(question) as asked:
            content = await asked.answer.read()
            status = asked.answer.status
            self._outcome = "unguarded" if status < 400 else "upstream_rejected" if status < 500 else "upstream_error"
            if status >= 400:
                content = CHAT_COMPLETIONS.engine_error(status, content)
            self._trace.answered(asked.engine.name, status)
            await reply.whole(status, content, asked.answer.content_type)
