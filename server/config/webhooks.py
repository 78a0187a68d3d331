"""Who is told of incidents as they happen."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from server.config.admin import is_loopback
from server.config.strict import Strict

Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
Host = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?$")]


class Webhook(Strict):
    """One address that incidents are sent to."""

    url: str = Field(description="https://HOST/PATH, or http:// on this machine. HOST must be one of `hosts`.")
    actions: tuple[Literal["flag", "steer", "block"], ...] = Field(
        default=("block",), min_length=1, description="Of which incidents: flag, steer, block."
    )
    secret_env: Variable = Field(
        default="UNDERTOW_WEBHOOK_SECRET",
        description="Name of the environment variable with the key (at least 16 characters) that messages are signed "
        "with; with `_FILE` behind it, of one that names a file with it.",
    )

    @property
    def host(self) -> str:
        """Where it goes."""
        return (urlsplit(self.url).hostname or "").lower()

    @model_validator(mode="after")
    def _plain_and_private(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected https://HOST/PATH")
        if parts.username or parts.password:
            raise ValueError("holds credentials (not shown); expected https://HOST/PATH, messages are signed")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError("expected https:// for another machine")
        return self


class Webhooks(Strict):
    """Messages to chat rooms, pagers and the like: signed, without any text of the request."""

    hosts: tuple[Host, ...] = Field(default=(), description="The only hosts that anything is sent to.")
    send: tuple[Webhook, ...] = Field(default=(), description="Where to, and which incidents.")

    @model_validator(mode="after")
    def _hosts_are_named(self) -> Self:
        for index, each in enumerate(self.send):
            if each.host not in self.hosts:
                raise ValueError(f"`webhooks.send.{index}.url` is at {each.host}; expected one of `webhooks.hosts`")
        return self
