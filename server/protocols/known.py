"""Every protocol that is spoken here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from server.errors import ApiError
from server.protocols.openai import CHAT, TEXT, Call, Endpoint, read_call
from server.protocols.protocol import Protocol, StreamWriter


class _AsItComes:
    """The engine's own stream is the client's."""

    def write(self, part: bytes) -> bytes:
        return part


def _whole(call: Call, answer: bytes) -> bytes:
    return answer


def _stream(call: Call) -> StreamWriter:
    return _AsItComes()


def _engine_error(status: int, content: bytes) -> bytes:
    return content


def _authorization(headers: Mapping[str, str]) -> str | None:
    return headers.get("authorization")


def _openai(endpoint: Endpoint) -> Protocol:
    return Protocol(
        endpoint, partial(read_call, endpoint), _whole, _stream, ApiError.body, _engine_error, _authorization
    )


CHAT_COMPLETIONS = _openai(CHAT)
COMPLETIONS = _openai(TEXT)

PROTOCOLS: tuple[Protocol, ...] = (CHAT_COMPLETIONS, COMPLETIONS)

_BY_PATH = {protocol.endpoint.path: protocol for protocol in PROTOCOLS}


def spoken_at(path: str) -> Protocol | None:
    """The protocol of a path's clients; None where nothing guarded is."""
    return _BY_PATH.get(path)


def error_body(path: str, error: ApiError) -> bytes:
    """The body of an error, as whoever asks at this path reads it; OpenAI's shape where nobody speaks."""
    protocol = spoken_at(path)
    return error.body() if protocol is None else protocol.error(error)
