"""How the clients of one endpoint speak.

Whatever they speak, one completion of OpenAI's is asked of the engine, judged and blocked. A protocol stands around
that: it turns a client's body into that completion, and what may be released of its answer into the client's own shape.
So there is one way through the guard, and what a protocol writes was judged before it saw it.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.errors import ApiError
from server.protocols.openai import Call, Endpoint, Terms


class StreamWriter(typing.Protocol):
    """Writes one stream. Sans-I/O; keeps what it needs of what it wrote."""

    def write(self, part: bytes) -> bytes:
        """`part`: whole events of a stream of OpenAI's, keep-alive comments and errors among them. Returns what the
        client gets for them, which may be nothing yet."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What one endpoint's clients ask, and the shape of everything that they are told."""

    endpoint: Endpoint
    read: Callable[[bytes, Terms], Call]
    """A client's body. Raises ApiError 400 that names the field."""
    whole: Callable[[Call, bytes], bytes]
    """A whole answer from a completion that may be released. Raises UpstreamError where it is none."""
    stream: Callable[[Call], StreamWriter]
    error: Callable[[ApiError], bytes]
    """The body of an error."""
    engine_error: Callable[[int, bytes], bytes]
    """The body of an error from the engine's, and its status."""
    authorization: Callable[[Mapping[str, str]], str | None]
    """From a client's headers, what stands in `Authorization` where it speaks as OpenAI's do."""
