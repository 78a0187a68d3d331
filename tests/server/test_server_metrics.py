"""Metrics: what is declared is exposed and documented, and nothing else is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from guard.faults import FAULT_MEANINGS, Fault
from server.errors import FAILURE_KINDS, UPSTREAM_KINDS, ServerFailure, UpstreamKind
from server.telemetry.logs import JsonFormatter
from server.telemetry.metrics import (
    DECLARATIONS,
    ENDPOINTS,
    FAILURE_MEANINGS,
    METRIC_NAMES,
    OUTCOMES,
    EndpointLabel,
    Metrics,
    Outcome,
    document,
)

from .conftest import KEY, Proxy, samples
from .fake_engine import FINGERPRINT, PROMPT_TOKENS, FakeEngine, Script
from .test_server_answers import CHAT, TEXT, chat_body, text_body

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def mixed_run(engine: FakeEngine, proxy: Proxy) -> None:
    """A bit of everything that can end in an answer."""
    scripts = [
        Script(),
        Script(flagged=True),
        Script(blocked={0: 0}),
        Script(blocked={0: 2}),
        Script(status=400),
        Script(status=500),
        Script(cut_after=3),
        Script(merge=2),
    ]
    for script in scripts:
        for stream in (False, True):
            engine.script = script
            proxy.post(CHAT, chat_body(stream=stream))
            proxy.post(TEXT, text_body(stream=stream, prompt=["a", "b"], n=2))
    engine.script = Script()
    proxy.post(CHAT, {"messages": 3})
    proxy.get("/v1/models")
    proxy.get("/nowhere")


def test_every_declared_metric_is_exposed_and_nothing_else(engine: FakeEngine, alone: Proxy) -> None:
    mixed_run(engine, alone)
    families = list(text_string_to_metric_families(alone.admin("/metrics").text))
    exposed = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert exposed == METRIC_NAMES
    assert all(family.documentation for family in families)


def test_labels_come_from_closed_sets(engine: FakeEngine, alone: Proxy) -> None:
    mixed_run(engine, alone)
    declared = {declaration.name: declaration for declaration in DECLARATIONS}
    for family in text_string_to_metric_families(alone.admin("/metrics").text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name not in declared:
            continue
        labels = declared[name].labels
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels.keys()
            for label, value in sample.labels.items():
                known = labels.get(label)
                assert known is None or value in known


def test_every_known_combination_starts_at_zero() -> None:
    text = Metrics("1").expose().decode()
    found = samples(text)
    for outcome in OUTCOMES:
        for endpoint in ENDPOINTS:
            labels = frozenset({("endpoint", endpoint), ("outcome", outcome)})
            assert found["undertow_requests_total", labels] == 0
    for kind in FAILURE_KINDS:
        assert found["undertow_guard_failures_total", frozenset({("kind", kind), ("mode", "enforce")})] == 0
    assert "undertow_threshold{" not in text, "a threshold that nobody has named yet is not 0"


def test_after_a_mixed_run_every_eligible_request_was_evaluated(engine: FakeEngine, alone: Proxy) -> None:
    mixed_run(engine, alone)
    for endpoint in ("chat_completions", "completions"):
        eligible = alone.sample("undertow_eligible_total", endpoint=endpoint)
        assert eligible == alone.sample("undertow_evaluated_total", endpoint=endpoint) == 10
    total = sum(
        value
        for (name, labels), value in samples(alone.admin("/metrics").text).items()
        if name == "undertow_requests_total" and ("endpoint", "chat_completions") in labels
    )
    assert total == 17, "each request ended in one outcome"
    assert alone.sample("undertow_requests_total", endpoint="models", outcome="allowed") == 1
    assert alone.sample("undertow_requests_total", endpoint="other", outcome="client_error") == 1
    assert alone.sample("undertow_upstream_errors_total", kind="status") == 4
    assert alone.sample("undertow_upstream_errors_total", kind="cut") == 4
    assert alone.sample("undertow_inflight_requests") == 0


def test_one_request_is_counted_as_it_was_judged(engine: FakeEngine, alone: Proxy) -> None:
    engine.script = Script(blocked={0: 3})
    alone.post(CHAT, chat_body())
    decided = {"detector": "density", "mode": "enforce"}
    assert alone.sample("undertow_decisions_total", phase="completion", action="block", **decided) == 1
    assert alone.sample("undertow_decisions_total", phase="prompt", action="allow", **decided) == 1
    assert alone.sample("undertow_tokens_scored_total", phase="prompt") == PROMPT_TOKENS
    assert alone.sample("undertow_tokens_scored_total", phase="completion") == 3
    assert alone.sample("undertow_threshold", detector="density", phase="prompt") == 2.0
    below = {"detector": "density", "phase": "completion", "le": "1.0"}
    assert alone.sample("undertow_exceedance_bucket", **below) == 0
    assert alone.sample("undertow_exceedance_bucket", **{**below, "le": "1.25"}) == 1
    assert alone.sample("undertow_requests_total", endpoint="chat_completions", outcome="blocked_output") == 1


def test_added_latency_leaves_the_engines_time_out(engine: FakeEngine, alone: Proxy) -> None:
    engine.script = Script(delay_s=0.3, token_delay_s=0.05)
    alone.post(CHAT, chat_body())
    alone.post(CHAT, chat_body(stream=True))
    assert alone.sample("undertow_added_latency_seconds_count") == 2
    assert alone.sample("undertow_added_latency_seconds_sum") < 0.15


def test_an_engines_info_names_the_bank_that_is_loaded(engine: FakeEngine, alone: Proxy) -> None:
    alone.post(CHAT, chat_body())
    found = [labels for name, labels in samples(alone.admin("/metrics").text) if name == "undertow_engine_info"]
    assert len(found) == 1
    assert found[0] == {("engine", "main"), ("fingerprint", FINGERPRINT)}


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document(), "run: python -m server.telemetry.metrics > docs/metrics.md"


def test_every_closed_set_holds_what_its_type_says() -> None:
    assert set(OUTCOMES) == set(get_args(Outcome))
    assert set(ENDPOINTS) == set(get_args(EndpointLabel))
    assert set(FAILURE_KINDS) == {*get_args(ServerFailure), *get_args(Fault)} == FAILURE_MEANINGS.keys()
    assert len(FAILURE_KINDS) == len(set(FAILURE_KINDS))
    assert set(get_args(Fault)) == FAULT_MEANINGS.keys()
    assert set(UPSTREAM_KINDS) == set(get_args(UpstreamKind))


def test_the_clients_key_is_found_nowhere(engine: FakeEngine, alone: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    mixed_run(engine, alone)
    answers = [alone.post(path, chat_body(), {}) for path in (CHAT, TEXT, "/v1/nothing")]
    formatter = JsonFormatter()
    ours = [record for record in caplog.records if record.name.startswith(("undertow", "uvicorn"))]
    assert ours
    written = "\n".join(formatter.format(record) for record in ours)
    spoken = "".join(answer.text + str(answer.headers) for answer in answers) + alone.admin("/metrics").text
    assert KEY not in written + spoken
    assert "six times seven" not in written


def test_a_fault_is_logged_by_its_place_and_not_by_its_text() -> None:
    try:
        raise ValueError("what the client wrote")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "fault", None, exc_info=__import__("sys").exc_info())
    line = JsonFormatter().format(record)
    assert "what the client wrote" not in line
    assert "test_server_metrics.py" in line
