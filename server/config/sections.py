"""The sections of the settings that are few keys each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.config.strict import Strict

LogLevel = Literal["debug", "info", "warning", "error"]


class Listen(Strict):
    """Where clients reach the proxy."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")


class Limits(Strict):
    """What one client may take."""

    max_body_bytes: int = Field(default=10 * 2**20, gt=0, description="Largest request body in bytes; 413 above.")
    max_sequences: int = Field(
        default=64, gt=0, description="Most answers that one request may ask for: prompts times `n`."
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds in which a whole body must arrive; 408 after."
    )
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="Seconds in which a request's headers must arrive; the connection ends after."
    )
    max_header_bytes: int = Field(default=64 * 2**10, ge=1024, description="Largest headers of a request; 431 above.")
    max_connections: int = Field(
        default=4000, gt=0, description="Clients' connections at a time; more are closed as they come."
    )
    engine_wait_s: float = Field(
        default=5.0, ge=0, description="Seconds that a request waits while every engine has all it may have; 503 after."
    )


class Shutdown(Strict):
    """What happens after SIGTERM."""

    delay_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds in which it goes on as before, but says that it is not ready: load balancers need them.",
    )
    grace_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds in which requests that run may end, while no new ones are taken; then they are cut off.",
    )


class Reloading(Strict):
    """When this file is read again."""

    every_s: float = Field(
        default=1.0,
        ge=0,
        description="Seconds between two looks at this file. What two in a row find changed is taken, whole or not at "
        "all. 0: only at SIGHUP.",
    )


class Log(Strict):
    """JSON lines on stderr."""

    level: LogLevel = Field(default="info", description="Least severe level that is written.")
