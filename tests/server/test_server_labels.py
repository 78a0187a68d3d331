"""Who asked for what, what was flagged where, and what passed unjudged: with labels that clients cannot multiply."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.access.keys import changed_keys, new_key
from server.app import create_app
from server.config.access import AccessSettings
from server.config.endpoints import Endpoints
from server.config.policies import PolicySettings
from server.config.settings import Settings
from server.telemetry.logs import JsonFormatter
from server.telemetry.names import Bounded, model_label

from .conftest import Proxy, samples, settings_for
from .fake_engine import MODEL, FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, chat_body

FLAGS = PolicySettings.model_validate({"detections": {"density": {"action": "flag", "threshold": {"fpr": 0.01}}}})


@contextmanager
def proxied(settings: Settings) -> Iterator[Proxy]:
    with hosted(create_app(settings), "on") as host:
        yield Proxy(host)


@pytest.fixture
def named(played: tuple[FakeEngine, Host]) -> Settings:
    """Settings that name the engine's model."""
    return settings_for(played[1].url, models=(MODEL,))


def test_a_model_that_nobody_knows_is_other_however_many_there_are(engine: FakeEngine, named: Settings) -> None:
    flagging = named.model_copy(update={"upstream": named.upstream.model_copy(update={"models": None})})
    with proxied(flagging) as proxy:
        for number in range(5):
            proxy.post(CHAT, chat_body(model=f"made-up-{number}"))
        assert proxy.sample("undertow_tenant_requests_total", tenant="none", model="other", outcome="allowed") == 5
        assert "made-up" not in proxy.admin("/metrics").text


def test_what_is_flagged_is_counted_by_model_layer_and_direction(engine: FakeEngine, named: Settings) -> None:
    engine.script = Script(blocked={0: 0})
    with proxied(named) as proxy:
        proxy.post(CHAT, chat_body(model=MODEL))
        where = {"layer": "2", "direction": "L2.o_proj.u0", "detector": "density", "phase": "prompt"}
        who = {"tenant": "none", "model": MODEL}
        assert proxy.sample("undertow_flagged_total", **who, **where, action="block") == 1
        assert proxy.sample("undertow_tenant_requests_total", **who, outcome="blocked_prompt") == 1
        engine.script = Script()
        proxy.post(CHAT, chat_body(model=MODEL))
        flagged = [
            value for (name, _), value in samples(proxy.admin("/metrics").text).items() if "flagged_total" in name
        ]
        assert flagged == [1], "what was allowed is not flagged"


def test_tenants_are_those_of_the_keys(engine: FakeEngine, named: Settings, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, record = new_key("lab", "", datetime.now(UTC), None)
    with changed_keys(file, create=True) as records:
        records.append(record)
    with proxied(named.model_copy(update={"access": AccessSettings(keys_file=file)})) as proxy:
        proxy.post(CHAT, chat_body(model=MODEL), {"authorization": f"Bearer {key}"})
        proxy.post(CHAT, chat_body(model=MODEL))
        assert proxy.sample("undertow_tenant_requests_total", tenant="lab", model=MODEL, outcome="allowed") == 1
        assert proxy.sample("undertow_tenant_requests_total", tenant="none", model="none", outcome="unauthorized") == 1
        assert record.id not in proxy.admin("/metrics").text


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (PolicySettings(mode="monitor"), "monitor"),
        (PolicySettings(mode="off"), "off"),
        (FLAGS.model_copy(update={"on_error": "open"}), "on_error_open"),
    ],
)
def test_what_passes_unjudged_is_counted_with_its_reason(
    engine: FakeEngine, named: Settings, policy: PolicySettings, reason: str
) -> None:
    engine.script = Script(fault="short")
    with proxied(named.model_copy(update={"policy": policy})) as proxy:
        assert proxy.post(CHAT, chat_body(model=MODEL)).headers["x-undertow-action"] == "unguarded"
        assert proxy.sample("undertow_bypass_total", reason=reason) == 1
        engine.script = Script()
        proxy.post(CHAT, chat_body(model=MODEL))
        assert proxy.sample("undertow_bypass_total", reason=reason) == 1


def test_what_is_refused_is_no_bypass_and_endpoints_that_generate_nothing_are(
    engine: FakeEngine, named: Settings
) -> None:
    with proxied(named.model_copy(update={"endpoints": Endpoints(unguarded=("embeddings",))})) as proxy:
        engine.script = Script(fault="short")
        assert proxy.post(CHAT, chat_body(model=MODEL)).status_code == 503
        engine.script = Script()
        assert proxy.post("/v1/embeddings", {"input": "text", "model": MODEL}).status_code == 200
        found = samples(proxy.admin("/metrics").text)
        reasons = {dict(labels)["reason"]: value for (name, labels), value in found.items() if "bypass_total" in name}
        assert reasons == {"endpoint": 1, "off": 0, "monitor": 0, "on_error_open": 0, "enforce": 0}
        assert proxy.sample("undertow_tenant_requests_total", tenant="none", model=MODEL, outcome="unguarded") == 1


def test_a_stream_that_is_kept_back_says_for_how_long(engine: FakeEngine, named: Settings) -> None:
    engine.script = Script(token_delay_s=0.05)
    for hold_back, least in (("token", 0.04), ("answer", 0.2)):
        policy = named.policy.model_copy(update={"hold_back": hold_back})
        with proxied(named.model_copy(update={"policy": policy})) as proxy:
            proxy.post(CHAT, chat_body(model=MODEL, stream=True))
            assert proxy.sample("undertow_hold_back_seconds_count") == 1
            assert least <= proxy.sample("undertow_hold_back_seconds_sum") < least + 0.15
            assert proxy.sample("undertow_upstream_seconds_sum", engine="main") >= 0.25
            assert proxy.sample("undertow_evaluation_seconds_count") == 1


def test_canaries_are_counted_by_what_became_of_them(engine: FakeEngine, alone: Proxy) -> None:
    assert alone.get("/readyz").status_code == 200
    assert alone.sample("undertow_canaries_total", engine="main", outcome="scored") >= 1
    assert alone.sample("undertow_canaries_total", engine="main", outcome="failed") == 0


def test_there_are_never_more_series_than_allowed() -> None:
    bounded = Bounded(most=2)
    assert [bounded.of((name, "block"), kept=1) for name in "abcab"] == [
        ("a", "block"),
        ("b", "block"),
        ("other", "block"),
        ("a", "block"),
        ("b", "block"),
    ]


@pytest.mark.parametrize(("name", "label"), [("m", "m"), ("n", "other"), (None, "none"), (3, "other"), ([], "other")])
def test_a_models_label(name: object, label: str) -> None:
    assert model_label(name, {"m"}) == label


SECRETS = {
    "prompt": "canary-prompt-7d1f",
    "answer": "canary-answer-90ab",
    "client key": "sk-canary-5b0c1f",
    "engine's key": "canary-engine-key-11c2",
    "operators' token": "canary-operator-token-6e02",
    "database": "canary-password-4f4f",
    "hash key": "canary-hash-key-0d0d-0d0d",
}


def test_no_secret_and_no_prompt_is_in_logs_errors_or_metrics(
    engine: FakeEngine, named: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever becomes of a request: answered, flagged, blocked, refused, failed."""
    from server.config.admin import AdminSettings
    from server.config.incidents import IncidentSettings

    environ = {
        "ENGINE_KEY": SECRETS["engine's key"],
        "UNDERTOW_OPERATOR_TOKEN": SECRETS["operators' token"],
        # Nobody listens there: the database's own errors, which like to name what they were given, are logged.
        "DATABASE_URL": f"postgresql://canary:{SECRETS['database']}@127.0.0.1:9/none",
        "UNDERTOW_HASH_KEY": SECRETS["hash key"],
    }
    settings = named.model_copy(
        update={
            "upstream": named.upstream.model_copy(update={"api_key_env": "ENGINE_KEY"}),
            "admin": AdminSettings(),
            "incidents": IncidentSettings(path=None, url_env="DATABASE_URL", spool=None),
        }
    )
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    prompt = [{"role": "user", "content": SECRETS["prompt"]}]
    with hosted(create_app(settings, environ), "on") as host:
        proxy = Proxy(host)
        scripts = [
            Script(tokens=(SECRETS["answer"],)),
            Script(flagged=True),
            Script(blocked={0: 0}),
            Script(blocked={0: 2}),
            Script(fault="missing"),
            Script(fault="invalid"),
            Script(status=500),
            Script(garbage=True),
            Script(cut_after=1),
        ]
        for script in scripts:
            engine.script = script
            for stream in (False, True):
                answer = proxy.post(CHAT, chat_body(model=MODEL, messages=prompt, stream=stream))
                said.append(f"{dict(answer.headers)}")
                if answer.status_code != 200:
                    said.append(answer.text)
        for body in ({"messages": prompt, SECRETS["prompt"]: 1}, {"messages": SECRETS["prompt"]}):
            # Whoever sent it is told the name of a field that is not known; the log is not.
            assert proxy.post(CHAT, body).status_code == 400
        token = {"authorization": f"Bearer {environ['UNDERTOW_OPERATOR_TOKEN']}"}
        wrong = {"authorization": "Bearer wrong"}
        for path in ("/metrics", "/readyz", "/incidents"):
            said += [proxy.admin(path, **token).text, proxy.admin(path, **wrong).text, proxy.admin(path).text]
        sent = {header.get("authorization") for header in engine.headers}
        assert sent == {"Bearer " + SECRETS["engine's key"]}, "the engine has its key, and no client's"
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("undertow")]
    assert len(lines) > len(scripts)
    assert all(json.loads(line) for line in lines)
    heard = "\n".join([*lines, *said])
    assert {name for name, secret in SECRETS.items() if secret in heard} == set()
