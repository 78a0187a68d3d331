"""A request's body, read within limits."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from server.config.sections import Limits
from server.errors import ApiError

_CLOSES = {"connection": "close"}
"""Or the rest of the body would be read, however long it is, to keep the connection."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises ApiError 408, 413 or 415; ClientDisconnect where the client leaves meanwhile.

    The size is checked while reading, so that a body without a length cannot fill the memory.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The content type must be application/json.", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_body_bytes:
        raise _too_large(limits)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, "The body did not arrive in time.", code="body_timeout", headers=_CLOSES) from None
    return b"".join(parts)


def _too_large(limits: Limits) -> ApiError:
    message = f"The body is larger than {limits.max_body_bytes} bytes."
    return ApiError(413, message, code="body_too_large", headers=_CLOSES)
