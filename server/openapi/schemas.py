"""JSON Schemas of what the server says. Answers that are the engine's hold more than what is named here."""

from __future__ import annotations

from typing import Any

from server.protocols.fields import Schema

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}


def said(*always: str, **properties: Schema) -> Schema:
    """An object with these properties, of which some are always there; all of them where none is named."""
    return {"type": "object", "properties": properties, "required": list(always or properties)}


def each(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def one_of(*values: object) -> Schema:
    return {"enum": list(values)}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_USAGE = said(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
_HEAD: dict[str, Schema] = {"id": TEXT, "created": {"type": "integer"}, "model": TEXT, "usage": _USAGE}
_FINISH: Schema = {"type": "string", "description": "`content_filter` where the choice was blocked."}

CHAT = said(
    **_HEAD,
    object=one_of("chat.completion"),
    choices=each(
        said(index=COUNT, finish_reason=_FINISH, message=said(role=one_of("assistant"), content=MAYBE_TEXT)),
    ),
)
COMPLETION = said(
    **_HEAD, object=one_of("text_completion"), choices=each(said(index=COUNT, finish_reason=_FINISH, text=TEXT))
)
_PART = said(type=TEXT, text=TEXT)
RESPONSE = said(
    id=TEXT,
    object=one_of("response"),
    created_at={"type": "integer"},
    model=TEXT,
    status=one_of("completed", "incomplete"),
    incomplete_details={
        "anyOf": [{"type": "null"}, said(reason=one_of("max_output_tokens", "content_filter"))],
        "description": "`content_filter` where the answer was blocked.",
    },
    output=each(
        {
            "anyOf": [
                said(
                    id=TEXT, type=one_of("message"), role=one_of("assistant"), content=each(said(type=TEXT, text=TEXT))
                ),
                said(id=TEXT, type=one_of("reasoning"), content=each(said(type=TEXT, text=TEXT))),
                said(id=TEXT, type=one_of("function_call"), call_id=TEXT, name=TEXT, arguments=TEXT),
            ]
        }
    ),
    usage=said(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
)
MESSAGE = said(
    id=TEXT,
    type=one_of("message"),
    role=one_of("assistant"),
    model=TEXT,
    content=each(
        {
            "anyOf": [
                said(type=one_of("text"), text=TEXT),
                said(type=one_of("thinking"), thinking=TEXT, signature=TEXT),
                said(type=one_of("tool_use"), id=TEXT, name=TEXT, input={"type": "object"}),
            ]
        }
    ),
    stop_reason={
        **one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"),
        "description": "`refusal` where the answer was blocked.",
    },
    stop_sequence=MAYBE_TEXT,
    usage=said(input_tokens=COUNT, output_tokens=COUNT),
)
MODELS = said(object=one_of("list"), data=each(said(id=TEXT, object=one_of("model"))))

OPENAI_ERROR = said(error=said("message", "type", message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT)) | {
    "additionalProperties": False
}
ANTHROPIC_ERROR = said(
    "type", "error", type=one_of("error"), error=said(type=TEXT, message=TEXT), request_id=MAYBE_TEXT
)

COMPONENTS: dict[str, Any] = {
    "ChatCompletion": CHAT,
    "Completion": COMPLETION,
    "Response": RESPONSE,
    "Message": MESSAGE,
    "Models": MODELS,
    "Error": OPENAI_ERROR,
    "AnthropicError": ANTHROPIC_ERROR,
}
