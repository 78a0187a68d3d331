"""The operators' port: who may use it, and what clients cannot see any more."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from guard.errors import ConfigError
from server import cli
from server.app import create_app
from server.config.settings import Settings

from .conftest import Proxy, settings_for
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted

TOKEN = "operators-token-0123456789"
DETAIL = ["/metrics", "/readyz"]


@pytest.fixture
def locked(engine: FakeEngine, played: tuple[FakeEngine, Host]) -> Iterator[Proxy]:
    app = create_app(settings_for(played[1].url), {"UNDERTOW_OPERATOR_TOKEN": TOKEN})
    with hosted(app, "on") as host:
        yield Proxy(host)


def test_clients_see_no_metrics_and_of_readiness_only_whether(engine: FakeEngine, enforce: Proxy) -> None:
    assert enforce.get("/metrics").status_code == 404
    ready = enforce.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"ready": True})
    assert enforce.get("/healthz").json() == {"status": "ok"}


def test_a_server_that_is_not_ready_tells_clients_that_and_operators_why(engine: FakeEngine, alone: Proxy) -> None:
    engine.script = Script(fault="missing")
    told = alone.get("/readyz")
    assert (told.status_code, told.json()) == (503, {"ready": False})
    assert "evidence_missing" in alone.admin("/readyz").json()["engines"]["main"]["reasons"]["canary"]


def test_completions_are_not_served_to_operators(enforce: Proxy) -> None:
    with httpx.Client(base_url=enforce.host.admin_url) as client:
        assert client.post("/v1/chat/completions", json={}).status_code == 404


@pytest.mark.parametrize("path", DETAIL)
@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Digest {TOKEN}",
        TOKEN,
        "Basic !!",
        "Basic " + base64.b64encode(f"{TOKEN}:".encode()).decode(),
        "Basic " + base64.b64encode(f"operator:{TOKEN[1:]}".encode()).decode(),
        "Bearer \xff",
    ],
)
def test_without_the_whole_token_nothing_is_told(locked: Proxy, path: str, given: str) -> None:
    with httpx.Client(base_url=locked.host.admin_url) as client:
        answer = client.get(path, headers=[("authorization", given.encode("latin-1"))])
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic")
    assert "undertow_" not in answer.text
    assert TOKEN not in answer.text


@pytest.mark.parametrize("path", DETAIL)
@pytest.mark.parametrize(
    "given", [f"Bearer {TOKEN}", f"bearer {TOKEN}", "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()]
)
def test_with_the_token_everything_is(locked: Proxy, path: str, given: str) -> None:
    assert locked.admin(path, authorization=given).status_code == 200
    assert locked.admin("/healthz").status_code == 200, "which a probe asks for"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_cannot_ask_for_its_reader(locked: Proxy, enforce: Proxy, site: str) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "sec-fetch-site": site}
    assert locked.admin("/metrics", **headers).status_code == 403
    assert enforce.admin("/metrics", **headers).status_code == 403
    assert locked.admin("/metrics", **(headers | {"sec-fetch-site": "same-origin"})).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example:8081", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("[::1]:8081", 200),
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("", 403),
    ],
)
def test_without_a_token_a_name_pointed_at_this_machine_does_not_help(enforce: Proxy, host: str, status: int) -> None:
    assert enforce.admin("/metrics", host=host).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "undertow", "127.evil"])
def test_a_port_that_others_can_reach_needs_a_token(host: str, tmp_path: Path) -> None:
    settings = Settings.model_validate({"version": 1, "admin": {"host": host}, "incidents": {"path": None}})
    with pytest.raises(ConfigError, match=r"`admin\.host` is .*expected a token in UNDERTOW_OPERATOR_TOKEN"):
        create_app(settings, {})
    with pytest.raises(ConfigError, match="5 characters; expected at least 16") as raised:
        create_app(settings, {"UNDERTOW_OPERATOR_TOKEN": "short"})
    assert "short" not in str(raised.value).replace("too short", "")
    (tmp_path / "token").write_text(TOKEN + "\n")
    create_app(settings, {"UNDERTOW_OPERATOR_TOKEN_FILE": str(tmp_path / "token")})


def test_status_sends_the_token_and_says_where_it_is_wrong(
    locked: Proxy,
    played: tuple[FakeEngine, Host],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["status", "--engine", played[1].url, "--server", locked.host.admin_url]
    monkeypatch.delitem(os.environ, "UNDERTOW_OPERATOR_TOKEN", raising=False)
    assert cli.main(words) == 1
    assert "answered 401; the operators' token is missing or wrong" in capsys.readouterr().err
    monkeypatch.setenv("MINE", TOKEN)
    assert cli.main([*words, "--token-env", "MINE"]) == 0
    assert cli.main([*words[:-1], locked.url, "--token-env", "MINE"]) == 1
    assert "is where clients reach the server; expected where operators do" in capsys.readouterr().err
