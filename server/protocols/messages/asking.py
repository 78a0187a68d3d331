"""A message request as a chat completion. Pure.

What has no place in a chat completion is not passed on: cache marks, signatures of thinking, `is_error` (a result says
itself that it is one), thinking budgets (vLLM takes them only where it was started for them; `max_tokens` bounds all).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from server.protocols.fields import wrong
from server.protocols.messages.accepted import MESSAGE_FIELDS
from server.protocols.openai import Call, Endpoint, Terms, parse, read_fields

MESSAGES = Endpoint("messages", "/v1/messages", "/v1/chat/completions", "messages", chat=True)

_AS_IT_IS = ("model", "stream", "temperature", "top_k", "top_p", "chat_template_kwargs", "cache_salt", "watermarking")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages(body: bytes, terms: Terms) -> Call:
    """Read a client's body. Raises ApiError 400 that names the field."""
    asked = parse(body)
    fields = MESSAGE_FIELDS.accept(asked)
    call = read_fields(MESSAGES, chat_completion(fields), terms)
    # Prompt tokens are named in a stream's first event.
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = {"stream_options": options} if call.stream else {}
    return replace(call, fields={**call.fields, **streamed}, wants_usage=call.stream, asked=asked)


def chat_completion(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chat completion that accepted fields ask for. Raises ApiError 400 where one is missing or not what it should
    be."""
    most = fields.get("max_tokens")
    if type(most) is not int or most < 1:
        raise wrong("max_tokens", "must be an integer of at least 1")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be a list of at least one message")
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        # Judged as a prompt, what a model says looks like nothing that a calibration has seen.
        where = f"messages[{len(messages) - 1}].role"
        raise wrong(where, "must be `user` in the last message: an answer that the client begins is not gone on with")
    chat: dict[str, Any] = {name: fields[name] for name in _AS_IT_IS if fields.get(name) is not None}
    chat["messages"] = [*_system(fields.get("system")), *_messages(messages)]
    chat["max_completion_tokens"] = most
    if fields.get("stop_sequences"):
        chat["stop"] = fields["stop_sequences"]
    if fields.get("tools"):
        chat["tools"] = [_tool(tool) for tool in fields["tools"]]
    chat |= _tool_choice(fields.get("tool_choice") or {})
    chat |= _thinking(fields.get("thinking") or {}, fields.get("output_config") or {})
    return chat


def _system(system: object) -> Iterator[dict[str, Any]]:
    text = _text(system)
    if text:
        yield {"role": "system", "content": text}


def _messages(messages: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise wrong(f"{where}.role", "must be `user`, `assistant` or `system`")
        content = message.get("content")
        if content is None:
            raise wrong(f"{where}.content", "must be text or a list of blocks")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif role == "assistant":
            yield _assistant(content)
        else:
            yield from _others(role, content, where)


def _assistant(blocks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One turn of the model's."""
    blocks = list(blocks)
    calls = [_tool_call(block) for block in blocks if block.get("type") == "tool_use"]
    thought = "".join(str(block.get("thinking") or "") for block in blocks if block.get("type") == "thinking")
    message: dict[str, Any] = {"role": "assistant", "content": _text(blocks) or (None if calls else "")}
    if thought:
        message["reasoning"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def _others(role: str, blocks: Iterable[Mapping[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own; text before and after them stays where it stood."""
    texts: list[Mapping[str, Any]] = []
    for position, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "text":
            texts.append(block)
        elif kind == "tool_result" and role == "user":
            if texts:
                yield {"role": role, "content": _text(texts)}
                texts = []
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(block.get("content"))}
        else:
            raise wrong(f"{where}.content[{position}].type", f"must be `text` in a message of role `{role}`")
    if texts:
        yield {"role": role, "content": _text(texts)}


def _text(content: object) -> str:
    """Of text, or of the text blocks in a list."""
    if not isinstance(content, list):
        return str(content or "")
    return "".join(str(block.get("text") or "") for block in content if block.get("type") == "text")


def _tool_call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
    return {"id": block.get("id"), "type": "function", "function": function}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    extras = {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {**function, **extras}}


def _tool_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    if not choice:
        return {}
    chosen: dict[str, Any] = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    if choice["type"] == "tool":
        chosen["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    else:
        chosen["tool_choice"] = _CHOICES[choice["type"]]
    return chosen


def _thinking(thinking: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if output.get("effort") is not None:
        chosen["reasoning_effort"] = output["effort"]
    elif thinking.get("type") == "disabled":
        chosen["reasoning_effort"] = "none"
    wanted = output.get("format")
    if wanted:
        schema = {"name": "answer", "schema": wanted.get("schema")}
        chosen["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chosen
