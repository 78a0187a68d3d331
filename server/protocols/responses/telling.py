"""A chat completion as a response, whole or streamed. Sans-I/O.

A blocked answer is `incomplete` with the reason `content_filter`. What an item says before the block, if anything,
stands in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.protocols.openai import Call
from server.protocols.responses.asking import LOGPROBS
from server.protocols.responses.items import Change, Items, Status
from server.protocols.said import Said, Tokens, read_answer
from server.protocols.writer import ChunkWriter, event

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""By the `finish_reason` of a chat: why a response is not complete."""


def whole(call: Call, answer: bytes) -> bytes:
    """A response. Raises UnreadableError."""
    said, items = read_answer(answer), Items()
    items.say(said)
    assert said.tokens is not None  # read_answer saw to it
    items.close(_status(said))
    return json.dumps(_ended(call, said, said, items, said.tokens)).encode()


class ResponseWriter(ChunkWriter):
    """response.created and in_progress; each item from `added` to `done`; then completed, incomplete or failed."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call
        self._items = Items()
        self._first: Said | None = None
        self._sent = 0

    def _begin(self, first: Said) -> list[bytes]:
        self._first = first
        fields = {"response": _response(self._call, first, "in_progress", [])}
        return self._events([("response.created", fields), ("response.in_progress", fields)])

    def _say(self, said: Said) -> list[bytes]:
        return self._events(self._items.say(said))

    def _end(self, last: Said, tokens: Tokens) -> list[bytes]:
        status = _status(last)
        changes = self._items.close(status)
        ended = _ended(self._call, self._first or last, last, self._items, tokens)
        return self._events([*changes, (f"response.{status}", {"response": ended})])

    def _error(self, error: Mapping[str, Any]) -> list[bytes]:
        message = str(error.get("message"))
        code = error.get("code")
        told = {"code": None if code is None else str(code), "message": message, "param": None}
        # OpenAI's own clients raise an error where data has one inside; its schema knows the flat fields.
        changes: list[Change] = [("error", {**told, "error": dict(error)})]
        if self._first is not None:
            failed = _response(self._call, self._first, "failed", self._items.output)
            failed["error"] = {"code": "server_error", "message": message}
            changes.append(("response.failed", {"response": failed}))
        return self._events(changes)

    def _events(self, changes: list[Change]) -> list[bytes]:
        events = []
        for kind, fields in changes:
            events.append(event(kind, {"sequence_number": self._sent, **fields}))
            self._sent += 1
        return events


def _status(said: Said) -> Status:
    return "incomplete" if said.finish_reason in _INCOMPLETE else "completed"


def _ended(call: Call, first: Said, last: Said, items: Items, tokens: Tokens) -> dict[str, Any]:
    """The whole response, after its last item was closed."""
    reason = _INCOMPLETE.get(last.finish_reason or "")
    return {
        **_response(call, first, _status(last), items.output),
        "incomplete_details": {"reason": reason} if reason else None,
        "usage": {
            "input_tokens": tokens.prompt,
            "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
            "output_tokens": tokens.completion,
            "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
            "total_tokens": tokens.prompt + tokens.completion,
        },
    }


def _response(call: Call, said: Said, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    asked = call.asked
    reasoning = asked.get("reasoning") or {}
    wanted = asked.get("text") or {}
    return {
        "id": f"resp_{said.id}",
        "object": "response",
        "created_at": said.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "max_tool_calls": asked.get("max_tool_calls"),
        "model": said.model,
        "output": output,
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "store": False,
        "temperature": asked.get("temperature"),
        "text": {"format": {"type": "text"}, **{name: value for name, value in wanted.items() if value is not None}},
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": [{"strict": None, "parameters": None, **tool} for tool in asked.get("tools") or ()],
        "top_logprobs": (asked.get("top_logprobs") or 0) if LOGPROBS in (asked.get("include") or ()) else 0,
        "top_p": asked.get("top_p"),
        "truncation": "disabled",
        "usage": None,
        "user": asked.get("user"),
        "metadata": asked.get("metadata") or {},
    }
