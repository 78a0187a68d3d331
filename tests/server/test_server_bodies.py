"""Whatever a body says, it is read or refused with a 400 that names a field; and what is read can be sent on."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy import Policy
from server.config.endpoints import Endpoints
from server.errors import ApiError
from server.openapi.clients import clients_document
from server.protocols.accepted import CHAT_FIELDS, TEXT_FIELDS
from server.protocols.known import PROTOCOLS
from server.protocols.openai import Terms
from server.protocols.protocol import Protocol

from .fake_engine import RESERVED

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WHOLE: dict[str, dict[str, Any]] = {
    "chat_completions": {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "rain"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["a"],
        "stop_token_ids": [3],
        "logit_bias": {"1": 2},
        "n": 2,
    },
    "completions": {"model": "m", "prompt": ["a", "b"], "stop_token_ids": [3], "n": 2, "stream": False, "best_of": 1},
    "responses": {
        "model": "m",
        "instructions": "i",
        "input": [
            {"role": "developer", "content": "d"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "n"}],
            },
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "t"}]},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"],
        "stream": True,
    },
    "messages": {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"city": "Ulm"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text"}]}]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "disabled"},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "stop_sequences": ["a"],
        "stream": True,
    },
}
"""Bodies with something in every place that is looked into."""
WORDS = ["text", "user", "assistant", "system", "tool", "function", "tool_use", "tool_result", "auto", "x", "\ud800"]
KEYS = ["type", "role", "content", "text", "name", "id", "input", "output", "image_url", "api_base", "cache_control"]

plain = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container inside, and every key or index of it."""
    found: list[tuple[Any, Any]] = []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        found += [(value, key), *places(inner)]
    return found


@st.composite
def bodies(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A whole body with a few things changed, added or taken away."""
    body = copy.deepcopy(WHOLE[name])
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        holder, key = draw(st.sampled_from(places(body)))
        match draw(st.sampled_from(["change", "add", "take"])):
            case "take":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(KEYS))] = draw(values)
            case "add":
                holder.append(draw(values))
            case _:
                holder[key] = draw(values)
    return body


def read(protocol: Protocol, body: dict[str, Any]) -> dict[str, Any] | ApiError:
    """What the engine would be sent."""
    try:
        call = protocol.read(json.dumps(body).encode(), Terms())
        sent: dict[str, Any] = json.loads(call.upstream_body(Policy(), RESERVED))
    except ApiError as error:
        return error
    return sent


@pytest.mark.parametrize("name", WHOLE)
def test_a_body_is_read_or_refused(name: str) -> None:
    [protocol] = [each for each in PROTOCOLS if each.endpoint.name == name]
    allowed = TEXT_FIELDS if name == "completions" else CHAT_FIELDS
    seen = {"read": 0, "refused": 0}
    document = clients_document(Endpoints())
    [content] = document["paths"][protocol.endpoint.path]["post"]["requestBody"]["content"].values()
    allowed_by_document = jsonschema.Draft202012Validator(content["schema"])

    @given(bodies(name))
    @settings(max_examples=300, deadline=None)
    def look(body: dict[str, Any]) -> None:
        told = read(protocol, body)
        if isinstance(told, ApiError):
            seen["refused"] += 1
            assert (told.status, bool(told.param)) == (400, True)
            assert json.loads(protocol.error(told))
            return
        seen["read"] += 1
        assert allowed_by_document.is_valid(body), "what the document forbids is refused"
        assert told.keys() <= allowed.passed.keys() | {"vllm_xargs"}
        assert RESERVED in told["stop_token_ids"]
        assert list(told["vllm_xargs"]) == ["undertow_policy"]

    look()
    assert min(seen.values()) > 30, seen
    assert not isinstance(read(protocol, WHOLE[name]), ApiError)
