"""The OpenAPI document of the operators' port.

undertow openapi operators > docs/openapi/operators.json
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from guard.version import VERSION
from server.admin.incidents import Said, Wanted
from server.incidents.incident import LABELS, Incident
from server.openapi.schemas import MAYBE_TEXT, TEXT, each, one_of, ref, said
from server.protocols.fields import Schema

_JSON = "application/json"
_TIME: Schema = {"type": "string", "format": "date-time"}
_MAYBE_TIME: Schema = {"anyOf": [_TIME, {"type": "null"}]}
_SWITCH: Schema = {"type": "boolean"}
_LABEL: Schema = one_of(*LABELS, None)
_HIDDEN = ("content", "sequences")
"""Of an incident, in a list of them."""


def operators_document() -> Schema:
    """OpenAPI 3.1, of a server that records incidents."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Undertow, for operators",
            "version": VERSION,
            "description": "Metrics, readiness and incidents. docs/operations.md says more.",
        },
        "paths": _PATHS,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "Token": {"type": "http", "scheme": "bearer", "description": "The operators' token."},
                "Password": {"type": "http", "scheme": "basic", "description": "The token as password, for browsers."},
            },
        },
        # On loopback there may be none.
        "security": [{}, {"Token": []}, {"Password": []}],
    }


def _schemas() -> Schema:
    incident, inner = _model(Incident)
    whole = {
        **incident["properties"],
        "label": _LABEL,
        "labelled_by": MAYBE_TEXT,
        "labelled_at": _MAYBE_TIME,
        "note": MAYBE_TEXT,
    }
    listed = {name: shape for name, shape in whole.items() if name not in _HIDDEN}
    history = each(said(at=_TIME, label=_LABEL, by=TEXT, note=TEXT))
    word, _ = _model(Said)
    return {
        **inner,
        "Listed": _closed(said(**listed)),
        "Labelled": _closed(said(**whole)),
        "Incident": _closed(said(**whole, history=history)),
        "Said": word,
        "Readiness": said(
            ready=_SWITCH,
            ending=_SWITCH,
            engines={
                "type": "object",
                "additionalProperties": said(ready={"type": "boolean"}, reasons={"type": "object"}),
            },
            settings={"type": ["object", "null"]},
        ),
        "Error": _closed(said(error=_closed(said(message=TEXT)))),
    }


def _closed(shape: Schema) -> Schema:
    return {**shape, "additionalProperties": False}


def _model(model: type[BaseModel]) -> tuple[Schema, Schema]:
    """A model's schema, and those that it refers to."""
    made: dict[str, Any] = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    return made, made.pop("$defs", {})


def _query() -> list[Schema]:
    """What a list is filtered by: as `Wanted` reads it, where null is the same as nothing."""
    found = []
    for name, shape in _model(Wanted)[0]["properties"].items():
        [kind] = [each for each in shape.get("anyOf", [shape]) if each.get("type") != "null"]
        if kind.get("format") == "date-time":
            kind = {"type": "string", "description": "ISO 8601 with its zone, or seconds since 1970."}
        kind = {key: value for key, value in kind.items() if key not in ("title", "default")}
        found.append({"name": name, "in": "query", "schema": kind})
    return found


def _answer(description: str, schema: Schema, kind: str = _JSON) -> Schema:
    return {"description": description, "content": {kind: {"schema": schema}}}


_REFUSED: Schema = {
    "401": _answer("The operators' token is missing or wrong.", TEXT, "text/plain"),
    "403": _answer("Asked from another site, or, without a token, under another name.", TEXT, "text/plain"),
}
_OF_INCIDENTS: Schema = {
    **_REFUSED,
    "400": _answer("A value that is not what it should be; named, without the value.", ref("Error")),
    "503": _answer("The database of incidents does not answer.", ref("Error")),
}
_UNKNOWN: Schema = {"404": _answer("There is no such incident.", ref("Error"))}
_ID: list[Schema] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 64}}]

_PATHS: Schema = {
    "/healthz": {
        "get": {
            "summary": "Whether the process runs; needs no token",
            "security": [],
            "responses": {"200": _answer("It does.", said(status=one_of("ok"))), "403": _REFUSED["403"]},
        }
    },
    "/readyz": {
        "get": {
            "summary": "Whether requests would be judged and answered, and why not, by engine",
            "responses": {
                "200": _answer("They would.", ref("Readiness")),
                "503": _answer("They would not.", ref("Readiness")),
                **_REFUSED,
            },
        }
    },
    "/metrics": {
        "get": {
            "summary": "For Prometheus",
            "responses": {"200": _answer("docs/metrics.md names them.", TEXT, "text/plain"), **_REFUSED},
        }
    },
    "/incidents": {
        "get": {
            "summary": "Incidents, newest first, without their text",
            "parameters": _query(),
            "responses": {
                "200": _answer("`after`: where to go on.", said(incidents=each(ref("Listed")), after=MAYBE_TEXT)),
                **_OF_INCIDENTS,
            },
        }
    },
    "/incidents/{id}": {
        "get": {
            "summary": "One incident, with its text as the policy keeps it, and what was said about it",
            "parameters": _ID,
            "responses": {"200": _answer("It.", ref("Incident")), **_UNKNOWN, **_OF_INCIDENTS},
        }
    },
    "/incidents/{id}/label": {
        "post": {
            "summary": "Say whether the behaviour was there",
            "parameters": _ID,
            "requestBody": {"required": True, "content": {_JSON: {"schema": ref("Said")}}},
            "responses": {"200": _answer("The incident.", ref("Labelled")), **_UNKNOWN, **_OF_INCIDENTS},
        }
    },
    "/": {
        "get": {
            "summary": "The page for a browser",
            "responses": {"200": _answer("HTML.", TEXT, "text/html"), **_REFUSED},
        }
    },
    "/openapi/clients.json": {
        "get": {
            "summary": "The document of the clients' port, as the settings have it",
            "responses": {"200": _answer("OpenAPI.", {"type": "object"}), **_REFUSED},
        }
    },
    "/openapi/operators.json": {
        "get": {"summary": "This document", "responses": {"200": _answer("OpenAPI.", {"type": "object"}), **_REFUSED}}
    },
}
