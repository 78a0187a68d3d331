"""Endpoints. What is not here is not offered: nothing that generates reaches the engine unguarded."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.errors import ApiError, UpstreamError, upstream_unavailable
from server.exchange import Exchange, Gateway
from server.passing import Passing
from server.protocols.known import CHAT_COMPLETIONS, PROTOCOLS, error_body, spoken_at
from server.protocols.openai import method_not_allowed, not_found
from server.protocols.protocol import Protocol
from server.protocols.unguarded import UNGUARDED, Unguarded
from server.readiness import Readiness
from server.telemetry.metrics import EndpointLabel, Metrics, Outcome
from server.upstreams.listing import list_models

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def build_router(gateway: Gateway, readiness: Readiness) -> APIRouter:
    """The guarded endpoints, the list of models, and what a load balancer asks for."""
    router = APIRouter(redirect_slashes=False)

    for protocol in PROTOCOLS:
        router.add_api_route(protocol.endpoint.path, _guarded(gateway, protocol), methods=["POST"])

    for endpoint in UNGUARDED:
        router.add_api_route(endpoint.path, _unguarded(gateway, endpoint), methods=_METHODS)

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        headers = {"x-request-id": request_id(request)}
        try:
            door, authorization = gateway.live.now.door, request.headers.get("authorization")
            door.admit(authorization)
            listing = await list_models(gateway.fleet.engines.values(), None if door.locked else authorization)
        except UpstreamError as error:
            gateway.metrics.upstream_failed(error.kind)
            gateway.metrics.requested("models", "upstream_error")
            return error_response(upstream_unavailable(error), headers)
        except ApiError as error:
            gateway.metrics.requested("models", "unauthorized" if error.status == 401 else "client_error")
            return error_response(error, headers)
        gateway.metrics.requested("models", _passed(listing.status))
        content = listing.content
        if listing.status >= 400:
            content = CHAT_COMPLETIONS.engine_error(listing.status, content)
        return Response(content, listing.status, headers, media_type=listing.content_type)

    @router.get("/healthz")
    async def healthz() -> Response:
        return Response(b'{"status": "ok"}', media_type="application/json")

    @router.get("/readyz")
    async def readyz() -> Response:
        # Why not is for operators: on the admin port.
        ready = (await readiness.check()).ready
        body = b'{"ready": true}' if ready else b'{"ready": false}'
        return Response(body, 200 if ready else 503, media_type="application/json")

    return router


def _guarded(gateway: Gateway, protocol: Protocol) -> Callable[[Request], Awaitable[Response]]:
    async def exchange(request: Request) -> Response:
        return Exchange(gateway, protocol, request, request_id(request))

    return exchange


def _unguarded(gateway: Gateway, endpoint: Unguarded) -> Callable[[Request], Awaitable[Response]]:
    async def passing(request: Request) -> Response:
        # Which ones are offered may change while the server runs.
        if endpoint.name not in gateway.live.now.settings.endpoints.unguarded:
            raise HTTPException(404)
        if request.method != "POST":
            raise HTTPException(405, headers={"Allow": "POST"})
        return Passing(gateway, endpoint, request, request_id(request))

    return passing


def request_id(request: Request) -> str:
    """The client's request id where it is harmless in a header and a log, a new one elsewhere."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def error_response(error: ApiError, headers: dict[str, str] | None = None, path: str = "") -> Response:
    """An error outside of an exchange, as the clients of `path` read it."""
    body = error_body(path, error)
    return Response(body, error.status, {**error.headers, **(headers or {})}, media_type="application/json")


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Unknown paths, wrong methods and faults, in OpenAI's shape."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        metrics.requested(_label(request), "client_error")
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            answer = method_not_allowed(request.method, allowed)
        elif error.status_code == 404:
            answer = not_found()
        else:
            answer = ApiError(error.status_code, "The request cannot be answered.")
        return error_response(answer, {"x-request-id": request_id(request)}, request.url.path)

    async def failed(request: Request, error: Exception) -> Response:
        fault = ApiError(500, "A fault in the server.", type="server_error", code="internal_error")
        return error_response(fault, path=request.url.path)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, failed)


def _passed(status: int) -> Outcome:
    if status < 400:
        return "allowed"
    return "upstream_rejected" if status < 500 else "upstream_error"


def _label(request: Request) -> EndpointLabel:
    protocol = spoken_at(request.url.path)
    if protocol is not None:
        return protocol.endpoint.name
    return "models" if request.url.path == "/v1/models" else "other"
