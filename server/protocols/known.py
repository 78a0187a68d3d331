"""Every protocol that is spoken here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from server.errors import ApiError
from server.protocols.messages import telling as messages
from server.protocols.messages.asking import MESSAGES, read_messages
from server.protocols.openai import CHAT, TEXT, Call, Endpoint, read_call
from server.protocols.protocol import Protocol, StreamWriter
from server.protocols.responses import telling as responses
from server.protocols.responses.asking import RESPONSES, read_response


class _AsItComes:
    """The engine's own stream is the client's."""

    def write(self, part: bytes) -> bytes:
        return part


def _whole(call: Call, answer: bytes) -> bytes:
    return answer


def _stream(call: Call) -> StreamWriter:
    return _AsItComes()


def _engine_error(status: int, content: bytes) -> bytes:
    """As it is, but for its code, which OpenAI's clients know as text: vLLM writes the status there."""
    try:
        told = json.loads(content)
        code = told["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return content
    if type(code) is not int:
        return content
    return json.dumps({**told, "error": {**told["error"], "code": str(code)}}).encode()


def _authorization(headers: Mapping[str, str]) -> str | None:
    return headers.get("authorization")


def _api_key(headers: Mapping[str, str]) -> str | None:
    """Anthropic's clients have a header of their own."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)


def _openai(endpoint: Endpoint) -> Protocol:
    return Protocol(
        endpoint, partial(read_call, endpoint), _whole, _stream, ApiError.body, _engine_error, _authorization
    )


CHAT_COMPLETIONS = _openai(CHAT)

PROTOCOLS: tuple[Protocol, ...] = (
    CHAT_COMPLETIONS,
    _openai(TEXT),
    Protocol(
        RESPONSES,
        read_response,
        responses.whole,
        responses.ResponseWriter,
        ApiError.body,
        _engine_error,
        _authorization,
    ),
    Protocol(
        MESSAGES,
        read_messages,
        messages.whole,
        lambda _: messages.MessageWriter(),
        messages.error,
        messages.engine_error,
        _api_key,
    ),
)

_BY_PATH = {protocol.endpoint.path: protocol for protocol in PROTOCOLS}


def spoken_at(path: str) -> Protocol | None:
    """The protocol of a path's clients; None where nothing guarded is."""
    return _BY_PATH.get(path)


def error_body(path: str, error: ApiError) -> bytes:
    """The body of an error, as whoever asks at this path, or below it, reads it; OpenAI's shape where nobody speaks."""
    for known, protocol in _BY_PATH.items():
        if path == known or path.startswith(f"{known}/"):
            return protocol.error(error)
    return error.body()
