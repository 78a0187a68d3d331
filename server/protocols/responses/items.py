"""The items of a response's output, from pieces of a chat completion, and the event of each change. Sans-I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal
from uuid import uuid4

from server.protocols.said import Said, ToolCall, UnreadableError

Change = tuple[str, dict[str, Any]]
"""An event's type and its fields."""
Status = Literal["completed", "incomplete"]


class Items:
    """At most one item is open: the last one. Its dict is the client's, as far as it is known."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open: tuple[str, int] | None = None
        """What the open item is of, and which of the tool calls."""
        self._calls = 0

    def say(self, said: Said) -> list[Change]:
        """Take one piece. Raises UnreadableError where it belongs to an item that was closed."""
        changes: list[Change] = []
        if said.reasoning:
            changes += self._begin("reasoning", _reasoning())
            changes.append(self._add("reasoning_text", said.reasoning))
        if said.text or (said.logprobs and self._open == ("message", 0)):
            changes += self._begin("message", _message())
            logprobs = [_logprob(each) for each in said.logprobs]
            self.output[-1]["content"][0]["logprobs"] += logprobs
            changes.append(self._add("output_text", said.text, logprobs=logprobs))
        for call in said.tool_calls:
            changes += self._call(call)
        return changes

    def close(self, status: Status) -> list[Change]:
        """The open item ends; nothing where none is open."""
        if self._open is None:
            return []
        (kind, _), self._open = self._open, None
        item = self.output[-1]
        item["status"] = status
        changes: list[Change] = []
        if kind == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            changes.append(("response.function_call_arguments.done", self._at(item) | arguments))
        else:
            part = item["content"][0]
            inside = self._at(item) | {"content_index": 0}
            text = {name: part[name] for name in ("text", "logprobs") if name in part}
            changes.append((f"response.{part['type']}.done", inside | text))
            changes.append(("response.content_part.done", inside | {"part": dict(part)}))
        changes.append(("response.output_item.done", {"output_index": len(self.output) - 1, "item": item}))
        return changes

    def _call(self, call: ToolCall) -> list[Change]:
        changes: list[Change] = []
        if self._open != ("function_call", call.index):
            if call.index < self._calls:
                raise UnreadableError("a tool call goes on that had ended")
            self._calls = call.index + 1
            changes += self._begin("function_call", _function_call(call), call.index)
        if call.arguments:
            item = self.output[-1]
            item["arguments"] += call.arguments
            changes.append(("response.function_call_arguments.delta", self._at(item) | {"delta": call.arguments}))
        return changes

    def _begin(self, kind: str, item: dict[str, Any], which: int = 0) -> list[Change]:
        """The changes that make this item the open one."""
        if self._open == (kind, which):
            return []
        changes = self.close("completed")
        self._open = (kind, which)
        self.output.append(item)
        parts = item.get("content")
        first = dict(item, content=[]) if parts else dict(item)
        changes.append(("response.output_item.added", {"output_index": len(self.output) - 1, "item": first}))
        if parts:
            inside = self._at(item) | {"content_index": 0}
            changes.append(("response.content_part.added", inside | {"part": _copy(parts[0])}))
        return changes

    def _add(self, kind: str, text: str, **more: object) -> Change:
        item = self.output[-1]
        item["content"][0]["text"] += text
        return f"response.{kind}.delta", self._at(item) | {"content_index": 0, "delta": text, **more}

    def _at(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.output) - 1}


def _reasoning() -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": ""}]
    return {"id": _new("rs"), "type": "reasoning", "summary": [], "content": content, "status": "in_progress"}


def _message() -> dict[str, Any]:
    content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    return {"id": _new("msg"), "type": "message", "role": "assistant", "content": content, "status": "in_progress"}


def _function_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": _new("fc"),
        "type": "function_call",
        "call_id": call.id or _new("call"),
        "name": call.name,
        "arguments": "",
        "status": "in_progress",
    }


def _logprob(told: Mapping[str, Any]) -> dict[str, Any]:
    top = told.get("top_logprobs")
    return _token(told) | {"top_logprobs": [_token(each) for each in _objects(top)]}


def _token(told: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": told.get("token"), "bytes": told.get("bytes") or [], "logprob": told.get("logprob")}


def _objects(values: object) -> Iterable[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _copy(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in part.items()}


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
