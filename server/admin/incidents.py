"""Incidents for operators: a list, one of them, what somebody says about it, and a page in the browser for all that."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.errors import InputError
from server.incidents.incident import Label, Reviewed, plain
from server.incidents.recorder import Recorder
from server.incidents.store import Filter, Store
from server.telemetry.metrics import Metrics

_PAGE = {"": "index.html", "incidents.js": "incidents.js", "incidents.css": "incidents.css", "chart.js": "chart.js"}
_TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


_MOST_LAYERS = 2**15
"""No model has as many, and every database can hold the number."""


class Said(BaseModel):
    """A reviewer's word."""

    model_config = ConfigDict(extra="forbid")

    label: Label
    by: Annotated[str, Field(min_length=1, max_length=128)]
    note: Annotated[str, Field(max_length=2000)] = ""


class Wanted(BaseModel):
    """Which incidents, and where to go on."""

    model_config = ConfigDict(extra="forbid")

    since: AwareDatetime | None = None
    until: AwareDatetime | None = None
    model: str | None = None
    tenant: str | None = None
    key: str | None = None
    policy: str | None = None
    action: str | None = None
    mode: str | None = None
    phase: str | None = None
    detector: str | None = None
    layer: Annotated[int, Field(ge=0, le=_MOST_LAYERS)] | None = None
    direction: str | None = None
    endpoint: str | None = None
    label: str | None = None
    request_id: str | None = None
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    after: str | None = None

    @property
    def filter(self) -> Filter:
        given: dict[str, Any] = self.model_dump(exclude={"limit", "after"})
        # PostgreSQL takes no NUL.
        given |= {name: plain(value) for name, value in given.items() if isinstance(value, str)}
        return Filter(**given)


def incidents_router(store: Store, recorder: Recorder, metrics: Metrics) -> APIRouter:
    """Endpoints that block run in threads."""
    router = APIRouter()

    @router.get("/incidents")
    def incidents(wanted: Annotated[Wanted, Query()]) -> dict[str, Any]:
        page = store.page(wanted.filter, wanted.limit, wanted.after)
        return {"incidents": [_row(each) for each in page.incidents], "after": page.after}

    @router.get("/incidents/{identity}")
    def incident(identity: Annotated[str, Path(max_length=64)]) -> Response:
        found = store.get(plain(identity))
        if found is None:
            return _not_found()
        history = [{**each, "at": _when(each["at"])} for each in store.history(identity)]
        return JSONResponse({**_whole(found), "history": history})

    @router.post("/incidents/{identity}/label")
    def label(identity: Annotated[str, Path(max_length=64)], said: Said) -> Response:
        found = store.label(plain(identity), said.label, plain(said.by), plain(said.note))
        if found is None:
            return _not_found()
        metrics.reviewed(said.label)
        recorder.tidy()
        return JSONResponse(_whole(found))

    @router.get("/")
    def page() -> Response:
        return _file("index.html")

    @router.get("/page/{name}")
    def asset(name: str) -> Response:
        return _file(_PAGE[name]) if name in _PAGE else _not_found()

    return router


async def refuse(request: Request, error: Exception) -> Response:
    """What was asked is not right; named, without the value."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"`{place}`: {first['msg']}" if place else str(first["msg"]))
    return _error(400, str(error))


async def otherwise(request: Request, error: Exception) -> Response:
    """No such path, a method that it does not know, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), error.headers)


async def unavailable(request: Request, error: Exception) -> Response:
    """The database does not answer."""
    return _error(503, "The database of incidents does not answer.")


class PageHeaders:
    """ASGI middleware: what a browser may do with whatever the operators' port says."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


ERRORS = {
    RequestValidationError: refuse,
    InputError: refuse,
    HTTPException: otherwise,
    SQLAlchemyError: unavailable,
}


def _row(reviewed: Reviewed) -> dict[str, Any]:
    """For a list: without the text."""
    whole = _whole(reviewed)
    del whole["content"], whole["sequences"]
    return whole


def _whole(reviewed: Reviewed) -> dict[str, Any]:
    fields = reviewed.model_dump(mode="json")
    incident: dict[str, Any] = fields.pop("incident")
    return {**incident, **fields}


def _when(at: datetime) -> str:
    return at.isoformat()


def _file(name: str) -> Response:
    content = files("server.admin").joinpath("page", name).read_bytes()
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]])


def _not_found() -> Response:
    return _error(404, "There is no such incident.")


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers)
