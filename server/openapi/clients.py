"""The OpenAPI document of the clients' port. What a body may hold is taken from the allow-lists that read it.

undertow openapi clients > docs/openapi/clients.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from guard.version import VERSION
from server.config.endpoints import Endpoints
from server.openapi.schemas import COMPONENTS, TEXT, each, one_of, ref, said
from server.protocols.accepted import TEXT_FIELDS, chat_fields
from server.protocols.fields import Allowed, Schema
from server.protocols.known import PROTOCOLS
from server.protocols.messages.accepted import MESSAGE_FIELDS
from server.protocols.openai import EndpointName
from server.protocols.responses.accepted import RESPONSE_FIELDS
from server.protocols.unguarded import UNGUARDED
from server.telling import SCHEMA

_JSON = "application/json"
_INTEGERS = each({"type": "integer"})
_SWITCH: Schema = {"type": ["boolean", "null"]}

_TOKENS: Schema = {"anyOf": [{"type": "null"}, _INTEGERS]}
_MANY = {"type": ["integer", "null"], "minimum": 1}


@dataclass(frozen=True, slots=True)
class _Spoken:
    """One guarded endpoint."""

    summary: str
    answer: str
    """Of the components."""
    error: str
    required: tuple[str, ...]
    strict: Mapping[str, Schema]
    """Fields that the server itself reads, closer than the allow-list: `protocols.openai` and the protocols' own."""


_SPOKEN: Mapping[EndpointName, _Spoken] = {
    "chat_completions": _Spoken(
        "A chat completion",
        "ChatCompletion",
        "Error",
        ("messages",),
        {"messages": {"type": "array"}, "stream": _SWITCH, "n": _MANY, "stop_token_ids": _TOKENS},
    ),
    "completions": _Spoken(
        "A completion",
        "Completion",
        "Error",
        ("prompt",),
        {
            "prompt": {
                "anyOf": [
                    TEXT,
                    {**_INTEGERS, "minItems": 1},
                    {**each(TEXT), "minItems": 1},
                    {**each(_INTEGERS), "minItems": 1},
                ]
            },
            "stream": _SWITCH,
            "n": _MANY,
            "stop_token_ids": _TOKENS,
        },
    ),
    "responses": _Spoken(
        "A response",
        "Response",
        "Error",
        ("input",),
        {
            "input": {"anyOf": [TEXT, {"type": "array", "minItems": 1}]},
            "stream": _SWITCH,
            "stop_token_ids": _TOKENS,
        },
    ),
    "messages": _Spoken(
        "A message",
        "Message",
        "AnthropicError",
        ("messages", "max_tokens"),
        {
            "messages": {
                **each(said(role=one_of("user", "assistant", "system"), content={"type": ["string", "array"]})),
                "minItems": 1,
                "description": "The last one is not the assistant's.",
            },
            "max_tokens": {"type": "integer", "minimum": 1},
            "stream": _SWITCH,
        },
    ),
}

_ERRORS: Mapping[int, str] = {
    400: "The body is not what it should be, or the prompt was blocked (`content_filter`).",
    401: "No API key, or one that opens nothing.",
    404: "The model does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the settings allow.",
    415: "The content type is not application/json.",
    422: "The engine cannot take what was asked.",
    429: "A limit of the API key is reached.",
    500: "The engine failed.",
    501: "The engine does not know how.",
    503: "The request could not be judged (`guard_unavailable`), no engine takes it, or the server ends.",
    504: "The engine was silent for too long.",
}
_REQUEST_ID: Schema = {"schema": TEXT, "required": True, "description": "The client's own, where it is harmless."}
_ACTION: Schema = {
    "schema": one_of("allow", "flag", "steer", "block", "unguarded", "pending"),
    "description": "The gravest that was done. `pending`: a stream begins, and its output has no verdict yet.",
}
_TOLD: Schema = {
    "x-undertow-policy": {"schema": TEXT, "description": "What judged the request, as the settings name it."},
    "x-undertow-schema": {"schema": one_of(SCHEMA), "description": "Version of these headers."},
    "x-undertow-incident": {"schema": TEXT, "description": "Where the request is kept, for operators."},
}
_KEYS: Schema = {"ApiKey": {"type": "http", "scheme": "bearer", "description": "Where the settings name keys."}}
_ASKS: list[Schema] = [
    {
        "name": "x-request-id",
        "in": "header",
        "schema": TEXT,
        "description": "1 to 64 letters, digits and hyphens; others are replaced.",
    }
]


def clients_document(endpoints: Endpoints) -> Schema:
    """OpenAPI 3.1. `endpoints`: of the settings, for what is not offered everywhere."""
    paths = {protocol.endpoint.path: {"post": _guarded(protocol.endpoint.name, endpoints)} for protocol in PROTOCOLS}
    for passed in UNGUARDED:
        if passed.name in endpoints.unguarded:
            paths[passed.path] = {"post": _passed(passed.accepted)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Undertow",
            "version": VERSION,
            "description": "OpenAI's and Anthropic's endpoints before a guarded model. docs/http.md says more.",
        },
        "paths": {**paths, **_ABOUT},
        "components": {"schemas": COMPONENTS, "securitySchemes": _KEYS},
        "security": [{}, {"ApiKey": []}],
    }


def _guarded(name: EndpointName, endpoints: Endpoints) -> Schema:
    spoken = _SPOKEN[name]
    body = _accepted(name, frozenset(endpoints.template_arguments))
    for field, closer in spoken.strict.items():
        body["properties"][field] = {"allOf": [body["properties"][field], closer]}
    # What events hold, no schema of the whole can say.
    streamed: Schema = {"schema": {}}
    answered = {
        "description": "The answer, as events where `stream` is true. A blocked one ends by `content_filter`, as its "
        "protocol says that.",
        "headers": {"x-request-id": _REQUEST_ID, "x-undertow-action": {**_ACTION, "required": True}, **_TOLD},
        "content": {_JSON: {"schema": ref(spoken.answer)}, "text/event-stream": streamed},
    }
    return {
        "summary": spoken.summary,
        "operationId": name,
        "parameters": _ASKS,
        "requestBody": {"required": True, "content": {_JSON: {"schema": {**body, "required": [*spoken.required]}}}},
        "responses": {"200": answered, **_errors(spoken.error)},
    }


def _accepted(name: EndpointName, template_arguments: frozenset[str]) -> Schema:
    """What a body may hold. All of them go through the chat's list in the end, where it is an object of its own."""
    chat = chat_fields(template_arguments).schema()
    if name == "chat_completions":
        return chat
    found = {"completions": TEXT_FIELDS, "responses": RESPONSE_FIELDS, "messages": MESSAGE_FIELDS}[name].schema()
    if name != "completions":
        found["properties"]["chat_template_kwargs"] = chat["properties"]["chat_template_kwargs"]
    return found


def _passed(accepted: Allowed) -> Schema:
    headers = {"x-request-id": _REQUEST_ID}
    return {
        "summary": "Passed to the engine without being judged: nothing is generated",
        "parameters": _ASKS,
        "requestBody": {"required": True, "content": {_JSON: {"schema": accepted.schema()}}},
        "responses": {
            "200": {"description": "The engine's answer.", "headers": headers, "content": {_JSON: {"schema": {}}}},
            **_errors("Error"),
        },
    }


def _errors(shape: str, *statuses: int) -> Schema:
    return {
        str(status): {
            "description": why,
            "headers": {"x-request-id": _REQUEST_ID, **_more(status)},
            "content": {_JSON: {"schema": ref(shape)}},
        }
        for status, why in _ERRORS.items()
        if not statuses or status in statuses
    }


def _more(status: int) -> Schema:
    if status == 401:
        return {"www-authenticate": {"schema": TEXT, "required": True}}
    seconds: Schema = {"schema": TEXT, "description": "Seconds."}
    if status == 429:
        return {"retry-after": {**seconds, "required": True}}
    if status == 503:
        return {"retry-after": seconds}
    if status == 400:
        retry = {"schema": one_of("false"), "description": "On a blocked prompt: asking again would not help."}
        return {"x-undertow-action": _ACTION, **_TOLD, "x-should-retry": retry}
    return {}


def _whether(description: str, **properties: Schema) -> Schema:
    return {"description": description, "content": {_JSON: {"schema": said(**properties)}}}


_ABOUT: Schema = {
    "/v1/models": {
        "get": {
            "summary": "The models of all engines",
            "operationId": "models",
            "responses": {
                "200": {
                    "description": "The list.",
                    "headers": {"x-request-id": _REQUEST_ID},
                    "content": {_JSON: {"schema": ref("Models")}},
                },
                **_errors("Error", 401, 404, 500, 503, 504),
            },
        }
    },
    "/healthz": {
        "get": {
            "summary": "Whether the process runs",
            "operationId": "healthz",
            "security": [],
            "responses": {"200": _whether("It does.", status=one_of("ok"))},
        }
    },
    "/readyz": {
        "get": {
            "summary": "Whether requests would be judged and answered",
            "operationId": "readyz",
            "security": [],
            "responses": {
                "200": _whether("They would.", ready=one_of(True)),
                "503": _whether("They would not; the operators' port says why.", ready=one_of(False)),
            },
        }
    },
}
