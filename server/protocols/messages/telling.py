"""A chat completion as a message, whole or streamed, and errors in Anthropic's shape. Sans-I/O.

A blocked answer ends with `stop_reason: refusal`, as Anthropic's own do where a classifier steps in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from server.errors import ApiError
from server.protocols.openai import Call
from server.protocols.said import Said, Tokens, ToolCall, UnreadableError, read_answer
from server.protocols.writer import ChunkWriter, event

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
"""By OpenAI's `finish_reason`; any other is `end_turn`."""

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_BUSY = ("upstream_busy", "shutting_down")


def error(failed: ApiError) -> bytes:
    """The body of an error."""
    return json.dumps(_error(_kind(failed.status, failed.code), failed.message)).encode()


def engine_error(status: int, content: bytes) -> bytes:
    """The body of an error of the engine's."""
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = "The model could not answer."
    return json.dumps(_error(_kind(status, None), message)).encode()


def whole(call: Call, answer: bytes) -> bytes:
    """A message. Raises UnreadableError."""
    said = read_answer(answer)
    content: list[dict[str, Any]] = []
    if said.reasoning:
        content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
    if said.text:
        content.append({"type": "text", "text": said.text})
    content += [_tool_use(tool_call) for tool_call in said.tool_calls]
    assert said.tokens is not None  # read_answer saw to it
    return json.dumps(
        {**_head(said), "content": content, **_stop(said, bool(said.tool_calls)), "usage": _usage(said.tokens)}
    ).encode()


class MessageWriter(ChunkWriter):
    """message_start, then each block from its start to its stop, then message_delta and message_stop."""

    def __init__(self) -> None:
        super().__init__()
        self._block: tuple[str, int] | None = None
        """The block that is open: what it is of, and which of the tool calls."""
        self._blocks = 0
        self._calls = 0

    def _begin(self, first: Said) -> list[bytes]:
        head = {**_head(first), "content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
        prompt = first.tokens or Tokens(0, 0, 0, 0)
        usage = _usage(Tokens(prompt.prompt, 0, prompt.cached, 0))
        return [event("message_start", {"message": {**head, "usage": usage}})]

    def _say(self, said: Said) -> list[bytes]:
        events: list[bytes] = []
        if said.reasoning:
            events += self._open("thinking", 0, {"thinking": "", "signature": ""})
            events.append(self._delta({"type": "thinking_delta", "thinking": said.reasoning}))
        if said.text:
            events += self._open("text", 0, {"text": ""})
            events.append(self._delta({"type": "text_delta", "text": said.text}))
        for call in said.tool_calls:
            events += self._tool_call(call)
        return events

    def _tool_call(self, call: ToolCall) -> list[bytes]:
        if self._block != ("tool_use", call.index):
            if call.index < self._calls:
                raise UnreadableError("a tool call goes on that had ended")
            self._calls = call.index + 1
        opened = self._open("tool_use", call.index, {"id": call.id or _new_id(), "name": call.name, "input": {}})
        if call.arguments:
            opened.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return opened

    def _open(self, kind: str, which: int, fields: Mapping[str, Any]) -> list[bytes]:
        """The events that make this block the open one."""
        if self._block == (kind, which):
            return []
        events = self._stop_block()
        self._block = (kind, which)
        block = {"type": kind, **fields}
        return [*events, event("content_block_start", {"index": self._blocks, "content_block": block})]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return event("content_block_delta", {"index": self._blocks, "delta": delta})

    def _stop_block(self) -> list[bytes]:
        if self._block is None:
            return []
        self._block = None
        self._blocks += 1
        return [event("content_block_stop", {"index": self._blocks - 1})]

    def _end(self, last: Said, tokens: Tokens) -> list[bytes]:
        delta = {"delta": _stop(last, self._calls > 0), "usage": _usage(tokens)}
        return [*self._stop_block(), event("message_delta", delta), event("message_stop", {})]

    def _error(self, error: Mapping[str, Any]) -> list[bytes]:
        return [event("error", _error(_kind(500, error.get("code")), str(error.get("message"))))]


def _head(said: Said) -> dict[str, Any]:
    return {"id": f"msg_{said.id}", "type": "message", "role": "assistant", "model": said.model}


def _stop(said: Said, called: bool) -> dict[str, Any]:
    """Why it stopped. A forced call of a tool ends with `stop`, as OpenAI says it."""
    reason = _STOP_REASONS.get(said.finish_reason or "", "end_turn")
    if reason == "end_turn":
        reason = "tool_use" if called else "end_turn" if said.stop is None else "stop_sequence"
    refusal = {"type": "refusal", "category": None, "explanation": None}
    return {
        "stop_reason": reason,
        "stop_sequence": said.stop if reason == "stop_sequence" else None,
        "stop_details": refusal if reason == "refusal" else None,
    }


def _usage(tokens: Tokens) -> dict[str, Any]:
    """Anthropic's input tokens are those that came from no cache."""
    return {
        "input_tokens": max(0, tokens.prompt - tokens.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.cached,
        "output_tokens": tokens.completion,
    }


def _tool_use(call: ToolCall) -> dict[str, Any]:
    try:
        given = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    # A call that was cut off, or that the model spelt wrong, is no call that a tool would take; its text stays to see.
    arguments = given if isinstance(given, dict) else {"arguments": call.arguments}
    return {"type": "tool_use", "id": call.id or _new_id(), "name": call.name, "input": arguments}


def _new_id() -> str:
    return f"toolu_{uuid4().hex}"


def _kind(status: int, code: object) -> str:
    if code in _BUSY:
        return "overloaded_error"
    return _ERRORS.get(status, "api_error")


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": None}
