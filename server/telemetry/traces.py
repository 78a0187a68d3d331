"""OpenTelemetry traces by the settings: a span of each request, in it the engine's part and the judging.

    traces = Traces(settings, environ, version)
    trace = traces.begin("chat_completions", request.headers)
    trace.asks()                # -> the `traceparent` for the engine
    trace.answered("gpu-1", 200)
    trace.end({...})

Spans are sent by a thread of their own from a queue that drops what it cannot hold: a collector that is slow, gone or
wrong costs requests nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from guard.errors import ConfigError
from server.config.telemetry import TraceSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

Attributes = Mapping[str, str | bool | int | float | None]
"""Names of the server's own, outcomes and counts; None is left out."""

_EXPORT_TIMEOUT_S = 5.0
_OFF = TraceSettings()
_NOTHING: Mapping[str, str] = {}


class Trace(Protocol):
    """Of one request."""

    def asks(self) -> str | None:
        """An engine is asked from now on; returns the `traceparent` that it is to be given."""

    def answered(self, engine: str | None, status: int | None) -> None:
        """That is over. None: no engine answered."""

    def end(self, attributes: Attributes, judged: Attributes | None) -> None:
        """The request is over. `judged`: of its judging; None where there was none."""


class _Untraced:
    def asks(self) -> str | None:
        return None

    def answered(self, engine: str | None, status: int | None) -> None:
        pass

    def end(self, attributes: Attributes, judged: Attributes | None) -> None:
        pass


class Traces:
    """Raises ConfigError where traces are asked for and cannot be made."""

    def __init__(
        self, settings: TraceSettings = _OFF, environ: Mapping[str, str] = _NOTHING, version: str = ""
    ) -> None:
        self._accepts = settings.accept_parent
        self._provider: TracerProvider | None = None
        if settings.endpoint is not None:
            self._provider = _provider(settings, settings.endpoint, environ, version)
            self._tracer = self._provider.get_tracer("undertow", version)

    def begin(self, endpoint: str, headers: Mapping[str, str]) -> Trace:
        """A request came."""
        if self._provider is None:
            return _Untraced()
        return _Traced(self._tracer, endpoint, headers.get("traceparent") if self._accepts else None)

    def close(self) -> None:
        """Send what is left, within bounds."""
        if self._provider is not None:
            self._provider.shutdown()


class _Traced:
    def __init__(self, tracer: Tracer, endpoint: str, parent: str | None) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()
        # Without a parent a new trace, whatever this thread is in.
        context = self._propagator.extract({"traceparent": parent} if parent else {})
        self._span = tracer.start_span(f"request {endpoint}", context, SpanKind.SERVER)
        self._engine: Span | None = None
        self._asked: int | None = None

    def asks(self) -> str | None:
        from opentelemetry.trace import SpanKind

        self._engine = self._tracer.start_span("upstream", self._inside(), SpanKind.CLIENT)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._inside(self._engine))
        return carrier.get("traceparent")

    def answered(self, engine: str | None, status: int | None) -> None:
        if self._engine is not None:
            _set(self._engine, {"undertow.engine": engine, "http.response.status_code": status})
            self._engine.end()
            self._engine = None

    def end(self, attributes: Attributes, judged: Attributes | None) -> None:
        if judged is not None:
            now = time.time_ns()
            seconds = judged.get("undertow.judge.seconds")
            spent = int(seconds * 1e9) if isinstance(seconds, float) else 0
            judge = self._tracer.start_span("judge", self._inside(), start_time=now - spent)
            _set(judge, judged)
            judge.end(now)
        self.answered(None, None)
        _set(self._span, attributes)
        self._span.end()

    def _inside(self, span: Span | None = None) -> Context:
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(span or self._span)


def _set(span: Span, attributes: Attributes) -> None:
    for name, value in attributes.items():
        if value is not None:
            span.set_attribute(name, value)


def _provider(settings: TraceSettings, endpoint: str, environ: Mapping[str, str], version: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError("`telemetry.traces.endpoint` needs OpenTelemetry: install `undertow[tracing]`") from error
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample)),
        resource=Resource.create({"service.name": "undertow", "service.version": version}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint, headers=_headers(settings, environ), timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _headers(settings: TraceSettings, environ: Mapping[str, str]) -> dict[str, str]:
    if settings.headers_env is None:
        return {}
    text = environ.get(settings.headers_env)
    pairs = [pair.partition("=") for pair in (text or "").split(",")]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        raise ConfigError(
            f"`telemetry.traces.headers_env` names {settings.headers_env}, which is not set, or not NAME=VALUE,..."
        )
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
