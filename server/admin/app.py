"""The operators' app: metrics and readiness in detail. Clients never reach it.

admin = create_admin(metrics, readiness, token, live)
admin.include_router(...)                          # what else operators see and do
"""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from server.admin.access import AdminAccess
from server.admin.incidents import ERRORS, PageHeaders
from server.in_force import Live
from server.openapi.clients import clients_document
from server.openapi.operators import operators_document
from server.readiness import Readiness
from server.telemetry.metrics import Metrics

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_admin(metrics: Metrics, readiness: Readiness, token: bytes | None, live: Live) -> FastAPI:
    """`token`: what `Authorization` must hold; None lets in whoever is on this machine."""
    admin = FastAPI(title="Undertow, for operators", docs_url=None, redoc_url=None, openapi_url=None)
    admin.router.redirect_slashes = False
    admin.add_middleware(AdminAccess, token=token)
    admin.add_middleware(PageHeaders)
    for kind, handler in ERRORS.items():
        admin.add_exception_handler(kind, handler)

    @admin.get("/healthz")
    async def healthz() -> Response:
        return Response(b'{"status": "ok"}', media_type="application/json")

    @admin.get("/readyz")
    async def readyz() -> Response:
        report = await readiness.check()
        return Response(report.body(), 200 if report.ready else 503, media_type="application/json")

    @admin.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.expose(), media_type=_METRICS_TYPE)

    @admin.get("/openapi/clients.json")
    async def clients() -> JSONResponse:
        return JSONResponse(clients_document(live.now.settings.endpoints))

    @admin.get("/openapi/operators.json")
    async def operators() -> JSONResponse:
        return JSONResponse(operators_document())

    return admin
