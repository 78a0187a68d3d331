"""What a chat completion of one choice says, whole or by the chunk, for protocols that say it otherwise. Sans-I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.assessment import choices_of
from server.errors import UpstreamError


class UnreadableError(UpstreamError):
    """What should be a chat completion is none. Never with its text."""

    def __init__(self, detail: str) -> None:
        super().__init__("protocol", detail)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, or the next piece of one."""

    index: int
    """Which of the choice's calls."""
    id: str
    name: str
    arguments: str
    """JSON, or a piece of it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What was used."""

    prompt: int
    completion: int
    cached: int
    """Of the prompt's."""
    reasoning: int
    """Of the completion's."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, or a piece of one."""

    id: str
    created: int
    model: str
    reasoning: str = ""
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()
    """Of the tokens of `text`."""
    finish_reason: str | None = None
    stop: str | None = None
    """The stop sequence that ended it."""
    tokens: Tokens | None = None


def read_answer(content: bytes) -> Said:
    """A whole chat completion. Raises UnreadableError."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    said = read_said(body, "message")
    if said.finish_reason is None or said.tokens is None:
        raise UnreadableError("a chat completion without an end, or without usage")
    return said


def read_said(body: object, place: str) -> Said:
    """A chat completion (`place`: message) or a chunk of one (delta), as JSON. Raises UnreadableError."""
    choices = choices_of(body) if isinstance(body, dict) else None
    if not isinstance(body, dict) or choices is None or len(choices) > 1:
        raise UnreadableError("not a chat completion of one choice")
    choice = choices[0] if choices else {}
    said = choice.get(place) or {}
    if not isinstance(said, dict):
        raise UnreadableError(f"a choice's `{place}` is not an object")
    created, stop = body.get("created"), choice.get("stop_reason")
    return Said(
        id=_text(body.get("id")).partition("-")[2] or _text(body.get("id")),
        created=created if isinstance(created, int) else 0,
        model=_text(body.get("model")),
        reasoning=_text(said.get("reasoning")),
        # A model's own refusal is text like any other.
        text=_text(said.get("content")) + _text(said.get("refusal")),
        tool_calls=_tool_calls(said.get("tool_calls")),
        logprobs=_logprobs(choice.get("logprobs")),
        finish_reason=choice.get("finish_reason"),
        stop=stop if isinstance(stop, str) else None,
        tokens=_tokens(body.get("usage")),
    )


def _tool_calls(calls: object) -> tuple[ToolCall, ...]:
    found = []
    for position, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UnreadableError("a tool call is not of the shape that OpenAI says")
        index = call.get("index")
        found.append(
            ToolCall(
                index if isinstance(index, int) else position,
                _text(call.get("id")),
                _text(function.get("name")),
                _text(function.get("arguments")),
            )
        )
    return tuple(found)


def _logprobs(logprobs: object) -> tuple[Mapping[str, Any], ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return tuple(content) if isinstance(content, list) else ()


def _tokens(usage: object) -> Tokens | None:
    if not isinstance(usage, dict):
        return None
    return Tokens(
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        _count(usage.get("prompt_tokens_details"), "cached_tokens"),
        _count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(counts: object, name: str) -> int:
    count = counts.get(name) if isinstance(counts, dict) else None
    return count if isinstance(count, int) else 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
