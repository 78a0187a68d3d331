"""Where operators reach the server, and by which token."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated

from pydantic import Field

from server.config.strict import Strict


class AdminSettings(Strict):
    """Metrics, readiness and incidents, on a port of their own that clients cannot reach."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(default=8081, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    token_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] = Field(
        default="UNDERTOW_OPERATOR_TOKEN",
        description="Name of the environment variable that holds the operators' token; with `_FILE` behind it, of one "
        "that names a file with it. Needed where `host` is not loopback; there and here it is asked for if it is set.",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
