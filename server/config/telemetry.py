"""What others are told of this process beside metrics and logs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.config.strict import Strict

Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]


class TraceSettings(Strict):
    """OpenTelemetry traces: a span for each request, in it the engine's part and the judging. Never prompts or keys."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None = Field(
        default=None,
        description="Where spans go by OTLP over HTTP, such as http://collector:4318/v1/traces. Null: there are none.",
    )
    headers_env: Variable | None = Field(
        default=None,
        description="Name of the environment variable with headers for the collector (NAME=VALUE, by commas): its key.",
    )
    sample: float = Field(default=1.0, ge=0, le=1, description="Share of requests that are traced.")
    accept_parent: bool = Field(
        default=False,
        description="A client's `traceparent` is continued. Only for trusted clients: they choose what is traced.",
    )


class TelemetrySettings(Strict):
    """Traces."""

    traces: TraceSettings = TraceSettings()
