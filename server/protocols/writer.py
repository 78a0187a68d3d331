"""A stream of OpenAI's chat chunks, said otherwise. Sans-I/O.

What comes in was judged: chunks of one choice, keep-alive comments, at most one error, `[DONE]`. Whatever comes, what
goes out ends as its protocol says a stream ends, once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from server.errors import upstream_cut
from server.protocols.said import Said, Tokens, UnreadableError, read_said
from server.sse import DONE, Event, EventParser


class ChunkWriter(ABC):
    """What every protocol does with such a stream; each says what it makes of a piece."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._begun = False
        self._ended = False
        self._last: Said | None = None
        """The piece that ended the answer."""
        self._tokens: Tokens | None = None
        """As counted last."""

    def write(self, part: bytes) -> bytes:
        """Whole events in, whole events out."""
        return b"".join(event for received in self._parser.feed(part) for event in self._event(received))

    def _event(self, event: Event) -> list[bytes]:
        if self._ended:
            return []
        if event.data is None:
            return [event.raw + b"\n"] if self._begun else []
        if event.data == DONE:
            return self._close()
        try:
            chunk = json.loads(event.data)
            if isinstance(chunk, dict) and isinstance(error := chunk.get("error"), dict):
                return self._fail(error)
            return self._piece(read_said(chunk, "delta"))
        except (ValueError, RecursionError, UnreadableError):
            return self._fail(upstream_cut().payload()["error"])

    def _piece(self, said: Said) -> list[bytes]:
        begun = [] if self._begun else self._begin(said)
        self._begun = True
        self._tokens = said.tokens or self._tokens
        if said.finish_reason is not None:
            self._last = said
        return begun + self._say(said)

    def _close(self) -> list[bytes]:
        if self._last is None:
            return self._fail(upstream_cut().payload()["error"])
        self._ended = True
        return self._end(self._last, self._tokens or Tokens(0, 0, 0, 0))

    def _fail(self, error: Mapping[str, Any]) -> list[bytes]:
        self._ended = True
        return self._error(error)

    @abstractmethod
    def _begin(self, first: Said) -> list[bytes]:
        """Before the first piece."""

    @abstractmethod
    def _say(self, said: Said) -> list[bytes]:
        """One piece. Raises UnreadableError where it fits none before."""

    @abstractmethod
    def _end(self, last: Said, tokens: Tokens) -> list[bytes]:
        """The end of an answer that ended in order, a block among that."""

    @abstractmethod
    def _error(self, error: Mapping[str, Any]) -> list[bytes]:
        """The end of a stream that failed; `error` in OpenAI's shape."""


def event(kind: str, fields: Mapping[str, Any]) -> bytes:
    """One event with a name, which its data repeats."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()
