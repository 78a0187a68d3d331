"""Traces, received by a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from guard.errors import ConfigError
from server.app import create_app
from server.config.endpoints import Endpoints
from server.config.telemetry import TelemetrySettings, TraceSettings
from server.telemetry.traces import Traces
from tests.ports import free_port

from .conftest import KEY, Proxy, settings_for
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, chat_body

COLLECTOR_KEY = "canary-collector-key-31a7"
ENVIRON = {"COLLECTOR": f"authorization=Bearer {COLLECTOR_KEY}"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """What it was sent."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.app = Starlette(routes=[Route("/v1/traces", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        if request.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        self.raw.append(body)
        self.headers.append(dict(request.headers))
        return Response(b"", self.status, media_type="application/x-protobuf")

    @property
    def spans(self) -> dict[str, Any]:
        """By name."""
        found = {}
        for body in self.raw:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found |= {span.name: span for span in scope.spans}
        return found


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@contextmanager
def traced(upstream: str, endpoint: str, endpoints: dict[str, Any] | None = None, **settings: Any) -> Iterator[Proxy]:
    """A server whose spans are sent when it ends."""
    traces = TraceSettings(endpoint=endpoint, headers_env="COLLECTOR", **settings)
    changes = {"telemetry": TelemetrySettings(traces=traces), "endpoints": Endpoints.model_validate(endpoints or {})}
    told = settings_for(upstream).model_copy(update=changes)
    with hosted(create_app(told, ENVIRON), "on") as host:
        yield Proxy(host)


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    found = Collector()
    with hosted(found.app) as host:
        yield found, f"{host.url}/v1/traces"


def test_a_request_has_a_span_with_the_engines_part_and_the_judging_inside(
    engine: FakeEngine, played: tuple[FakeEngine, Host], collector: tuple[Collector, str]
) -> None:
    found, endpoint = collector
    engine.script = Script(delay_s=0.05)
    with traced(played[1].url, endpoint) as proxy:
        answer = proxy.post(CHAT, chat_body(model="made-up"), {"traceparent": PARENT})
    request, upstream, judge = (found.spans[name] for name in ("request chat_completions", "upstream", "judge"))
    assert {upstream.parent_span_id, judge.parent_span_id} == {request.span_id}
    assert request.parent_span_id == b"", "clients are not asked what is traced"
    told = attributes(request)
    assert told["undertow.outcome"] == "allowed"
    assert told["undertow.request_id"] == answer.headers["x-request-id"]
    assert told["undertow.model"] == "other"
    assert attributes(upstream) == {"undertow.engine": "main", "http.response.status_code": 200}
    assert upstream.end_time_unix_nano - upstream.start_time_unix_nano > 0.05e9
    # Sampled, and, as the newer standard says, of a trace whose id is random.
    assert engine.headers[-1]["traceparent"] in (
        f"00-{request.trace_id.hex()}-{upstream.span_id.hex()}-0{flags}" for flags in "13"
    )
    assert found.headers[-1]["authorization"] == f"Bearer {COLLECTOR_KEY}"


def test_what_passes_unguarded_has_a_span_and_the_engines_part_and_no_judging(
    engine: FakeEngine, played: tuple[FakeEngine, Host], collector: tuple[Collector, str]
) -> None:
    found, endpoint = collector
    with traced(played[1].url, endpoint, endpoints={"unguarded": ["tokenize"]}) as proxy:
        answer = proxy.post("/tokenize", {"prompt": "words-of-the-prompt"})
    assert answer.status_code == 200
    assert found.spans.keys() == {"request tokenize", "upstream"}
    request, upstream = found.spans["request tokenize"], found.spans["upstream"]
    assert upstream.parent_span_id == request.span_id
    told = attributes(request)
    assert (told["undertow.outcome"], told["http.response.status_code"]) == ("unguarded", 200)
    assert engine.headers[-1]["traceparent"].split("-")[2] == upstream.span_id.hex()
    assert "words-of-the-prompt" not in str(found.spans)


def test_a_trusted_clients_trace_is_continued(
    engine: FakeEngine, played: tuple[FakeEngine, Host], collector: tuple[Collector, str]
) -> None:
    found, endpoint = collector
    with traced(played[1].url, endpoint, accept_parent=True) as proxy:
        proxy.post(CHAT, chat_body(stream=True), {"traceparent": PARENT})
    request = found.spans["request chat_completions"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert engine.headers[-1]["traceparent"].split("-")[1] == PARENT.split("-")[1]


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (Script(blocked={0: 0}), "blocked_prompt"),
        (Script(blocked={0: 2}), "blocked_output"),
        (Script(fault="missing"), "guard_failed"),
        (Script(cut_after=1), "upstream_error"),
    ],
)
def test_whatever_becomes_of_a_request_its_spans_have_no_prompt_and_no_key(
    engine: FakeEngine,
    played: tuple[FakeEngine, Host],
    collector: tuple[Collector, str],
    script: Script,
    outcome: str,
) -> None:
    found, endpoint = collector
    engine.script = script
    prompt = "canary-prompt-22b8"
    with traced(played[1].url, endpoint) as proxy:
        proxy.post(CHAT, chat_body(stream=True, messages=[{"role": "user", "content": prompt}]))
    assert attributes(found.spans["request chat_completions"])["undertow.outcome"] == outcome
    raw = b"".join(found.raw)
    assert [secret for secret in (prompt, KEY, COLLECTOR_KEY, "PAYLOAD") if secret.encode() in raw] == []


def test_a_collector_that_is_not_there_costs_requests_nothing(
    engine: FakeEngine, played: tuple[FakeEngine, Host]
) -> None:
    with traced(played[1].url, f"http://127.0.0.1:{free_port()}/v1/traces") as proxy:
        proxy.post(CHAT, chat_body())
        begun = time.monotonic()
        assert [proxy.post(CHAT, chat_body()).status_code for _ in range(20)] == [200] * 20
        assert time.monotonic() - begun < 4


def test_without_traces_the_engine_gets_no_traceparent(engine: FakeEngine, enforce: Proxy) -> None:
    enforce.post(CHAT, chat_body(), {"traceparent": PARENT})
    assert "traceparent" not in engine.headers[-1]


@pytest.mark.parametrize("value", [None, "", "no-value", "a=b,c"])
def test_headers_that_are_not_there_or_not_right_are_an_error_without_their_value(value: str | None) -> None:
    settings = TraceSettings(endpoint="http://127.0.0.1:9/v1/traces", headers_env="COLLECTOR")
    with pytest.raises(ConfigError, match="COLLECTOR") as raised:
        Traces(settings, {} if value is None else {"COLLECTOR": value}, "1")
    assert not value or value not in str(raised.value)


def test_an_endpoint_with_a_password_is_refused() -> None:
    with pytest.raises(ValueError, match="endpoint"):
        TraceSettings(endpoint="http://user:password@collector/v1/traces")
