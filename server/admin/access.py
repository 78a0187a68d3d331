"""Who may use the admin port: whoever has the token, or, on loopback and without one, whoever is on this machine."""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from guard.control import read_token
from guard.errors import ConfigError
from server.config.admin import AdminSettings, is_loopback

OPEN_PATHS = frozenset({"/healthz"})
"""Says nothing but that the process runs; probes have no token."""


def operator_token(settings: AdminSettings, environ: Mapping[str, str]) -> bytes | None:
    """The token that the admin port asks for; None where it asks for none. Raises ConfigError where it has to."""
    token = read_token(environ, settings.token_env)
    if token is None and not is_loopback(settings.host):
        raise ConfigError(
            f"`admin.host` is {settings.host}, which others can reach: expected a token in {settings.token_env} or "
            f"{settings.token_env}_FILE (at least 16 characters), or `admin.host: 127.0.0.1`"
        )
    return token


class AdminAccess:
    """ASGI middleware that lets nobody else through.

    The token comes as `Authorization: Bearer TOKEN`, or, from a browser, as the password of Basic authentication. A
    page of another site must not ask in the name of whoever looks at it: neither across sites, nor, where no token is
    asked for, under a name of its own that it has pointed at this machine.
    """

    def __init__(self, app: ASGIApp, token: bytes | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return PlainTextResponse("Asked from another site.\n", 403)
        if scope["path"] in OPEN_PATHS:
            return None
        if self._token is None:
            if not is_loopback(_host(headers.get("host", ""))):
                return PlainTextResponse("Without a token this port is for 127.0.0.1 and localhost.\n", 403)
            return None
        if not hmac.compare_digest(_credentials(headers.get("authorization", "")), self._token):
            asked = {"www-authenticate": 'Basic realm="undertow", charset="UTF-8"'}
            return PlainTextResponse("The operators' token is missing or wrong.\n", 401, asked)
        return None


def _host(authority: str) -> str:
    """A Host header without its port."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


def _credentials(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
