"""A request for a response as a chat completion. Pure.

What belongs to one turn of the model's, reasoning, text and calls of tools, is one message of the chat. Instructions
and what developers say are the system's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from server.protocols.fields import wrong
from server.protocols.openai import Call, Endpoint, Terms, parse, read_fields
from server.protocols.responses.accepted import RESPONSE_FIELDS

RESPONSES = Endpoint("responses", "/v1/responses", "/v1/chat/completions", "input", chat=True)

LOGPROBS = "message.output_text.logprobs"

_ELSEWHERE = frozenset(
    {
        "input",
        "instructions",
        "max_output_tokens",
        "reasoning",
        "text",
        "tools",
        "tool_choice",
        "include",
        "top_logprobs",
    }
)
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def read_response(body: bytes, terms: Terms) -> Call:
    """Read a client's body. Raises ApiError 400 that names the field."""
    asked = parse(body)
    call = read_fields(RESPONSES, chat_completion(RESPONSE_FIELDS.accept(asked)), terms)
    return replace(call, wants_usage=call.stream, asked=asked)


def chat_completion(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chat completion that accepted fields ask for. Raises ApiError 400 where one is missing or not what it should
    be."""
    chat = {name: value for name, value in fields.items() if name not in _ELSEWHERE and value is not None}
    chat["messages"] = _joined(_messages(fields))
    if fields.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = fields["max_output_tokens"]
    if fields.get("tools"):
        chat["tools"] = [_tool(tool) for tool in fields["tools"]]
    choice = fields.get("tool_choice")
    if isinstance(choice, dict):
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif choice is not None and chat.get("tools"):
        chat["tool_choice"] = choice
    effort = (fields.get("reasoning") or {}).get("effort")
    if effort is not None:
        chat["reasoning_effort"] = effort
    wanted = (fields.get("text") or {}).get("format")
    if wanted:
        chat["response_format"] = _format(wanted)
    if LOGPROBS in (fields.get("include") or ()):
        chat |= {"logprobs": True, "top_logprobs": fields.get("top_logprobs") or 0}
    return chat


def _messages(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if fields.get("instructions"):
        yield {"role": "system", "content": fields["instructions"]}
    given = fields.get("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
    elif isinstance(given, list) and given:
        for index, item in enumerate(given):
            yield _message(item, f"input[{index}]")
    else:
        raise wrong("input", "must be text, or a list of at least one item")


def _message(item: object, where: str) -> dict[str, Any]:
    """One item, as the message or the part of one that it is."""
    if not isinstance(item, dict):
        raise wrong(where, "must be an object")
    match item.get("type") or "message":
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))}
        case "reasoning":
            return {"role": "assistant", "reasoning": _text(item.get("content")) or _text(item.get("summary"))}
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", "must be `user`, `assistant`, `system` or `developer`")
    if item.get("content") is None:
        raise wrong(f"{where}.content", "must be text or a list of parts")
    return {"role": _ROLES[role], "content": _text(item["content"])}


def _joined(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's turns put together, and what the system says at the start: many templates take one such message."""
    found: list[dict[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {}
        if message["role"] == last.get("role") == "system" and len(found) == 1:
            last["content"] = f"{last['content']}\n\n{message['content']}"
        elif message["role"] == last.get("role") == "assistant" and _goes_on(last, message):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message.pop("tool_calls", ())]
            last.update(message)
            if not last["tool_calls"]:
                del last["tool_calls"]
        else:
            found.append(message)
    for message in found:
        message.setdefault("content", None if message.get("tool_calls") else "")
    return found


def _goes_on(turn: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    """Whether it belongs to the turn: first its reasoning, then its text, then its calls."""
    order = ("reasoning", "content", "tool_calls")
    reached = max(order.index(name) for name in order if name in turn)
    begins = min(order.index(name) for name in order if name in more)
    return begins > reached or begins == reached == order.index("tool_calls")


def _text(content: object) -> str:
    """Of text, or of the parts in a list."""
    if not isinstance(content, list):
        return str(content or "")
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in content if part)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    if wanted["type"] != "json_schema":
        return dict(wanted)
    names = ("name", "description", "schema", "strict")
    schema = {name: wanted[name] for name in names if wanted.get(name) is not None}
    return {"type": "json_schema", "json_schema": schema}
