"""How to reach the engine."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from server.config.strict import Strict

ModelName = Annotated[str, Field(min_length=1)]
EngineName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
"""Names an engine in metrics, logs and readiness."""


class UpstreamSettings(Strict):
    """The vLLM server that is guarded."""

    url: str = Field(default="http://127.0.0.1:8000", description="Where vLLM listens, without /v1.")
    connect_timeout_s: float = Field(default=2.0, gt=0, description="Seconds to wait for a connection.")
    read_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds of silence from vLLM, before or inside an answer, that end a request."
    )
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = Field(
        default=None,
        description="Name of the environment variable that holds vLLM's API key. Where set, that key replaces the "
        "client's Authorization; where null, the client's own is forwarded.",
    )
    fingerprint: str | None = Field(
        default=None,
        min_length=1,
        description="The bank that must be loaded, as `undertow bank inspect` names it. Null accepts any.",
    )
    models: Annotated[tuple[ModelName, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="The models and adapters that it is asked for, by the names that requests give. Null: what its "
        "/v1/models lists, or, where it is the only engine, everything.",
    )
    max_connections: int = Field(
        default=1000, gt=0, description="Requests that it works on at a time for one server; others wait for a while."
    )

    @field_validator("url")
    @classmethod
    def _plain_http(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port_is_good = parts.port is None or parts.port > 0
        except ValueError:
            port_is_good = False
        if not port_is_good or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise ValueError("must not hold credentials; put the key in a variable and name it in `api_key_env`")
        if parts.query or parts.fragment or parts.path not in ("", "/"):
            raise ValueError("expected no path, query or fragment after the port")
        return url.rstrip("/")
