"""What guards an engine changes while it serves: no request fails for it, and the server knows within a second."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from guard.control import RELOAD_PATH, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, Loaded, Wanted, admin_token
from guard.errors import ConfigError
from server import cli
from server.app import create_app
from server.commands import up

from .conftest import Proxy, settings_for
from .fake_engine import CALIBRATION, FINGERPRINT, FakeEngine, Script, status
from .hosting import Host, hosted

CHAT = "/v1/chat/completions"
TOKEN = "sk-canary-of-some-length"
OTHER = "d" * 16


def body(**more: object) -> dict[str, object]:
    return {"model": "organism", "messages": [{"role": "user", "content": "hi"}], **more}


@pytest.fixture
def changing() -> Iterator[tuple[FakeEngine, Host]]:
    engine = FakeEngine()
    with hosted(engine.app) as upstream:
        yield engine, upstream


def change(engine: FakeEngine, guard: tuple[str, str], generation: int = 2) -> None:
    engine.status = status(guard[0], calibration=guard[1], generation=generation)
    engine.script = replace(engine.script, guard=guard)


GUARDS = {"calibration": (FINGERPRINT, OTHER), "bank and calibration": ("b" * 16, OTHER)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
def test_the_first_request_after_a_change_is_answered(
    changing: tuple[FakeEngine, Host], guard: tuple[str, str], stream: bool
) -> None:
    engine, upstream = changing
    with hosted(create_app(settings_for(upstream.url)), "on") as host:
        proxy = Proxy(host)
        assert proxy.post(CHAT, body(stream=stream)).status_code == 200
        change(engine, guard)
        answer = proxy.post(CHAT, body(stream=stream))
        assert answer.status_code == 200
        assert "error" not in answer.text
        assert proxy.sample("undertow_guard_failures_total", kind="fingerprint", mode="enforce") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_run_through_a_change_are_answered_whichever_guard_they_name(
    changing: tuple[FakeEngine, Host], stream: bool
) -> None:
    """One that ends just before the change is read after the server knows of it, and the other way round."""
    engine, upstream = changing
    guard = GUARDS["bank and calibration"]
    engine.script = Script(token_delay_s=0.1, delay_s=0.4)
    with hosted(create_app(settings_for(upstream.url)), "on") as host, ThreadPoolExecutor(8) as pool:
        proxy = Proxy(host)
        assert proxy.admin("/readyz").status_code == 200
        answers = [pool.submit(proxy.post, CHAT, body(stream=stream)) for _ in range(4)]
        time.sleep(0.2)
        # The engine names the new guard in what it says from now on; those answers began under the old one.
        change(engine, guard)
        eventually(lambda: proxy.admin("/metrics").text.count(guard[0]) > 0)
        late = [pool.submit(proxy.post, CHAT, body(stream=stream)) for _ in range(4)]
        found = [answer.result() for answer in (*answers, *late)]
    assert [answer.status_code for answer in found] == [200] * 8
    assert not any("error" in answer.text for answer in found)


def test_a_request_that_runs_through_two_changes_may_name_the_one_between(
    changing: tuple[FakeEngine, Host],
) -> None:
    engine, upstream = changing
    with hosted(create_app(settings_for(upstream.url)), "on") as host, ThreadPoolExecutor(1) as pool:
        proxy = Proxy(host)
        assert proxy.admin("/readyz").status_code == 200
        engine.script = Script(token_delay_s=0.5)
        change(engine, GUARDS["calibration"])
        answer = pool.submit(proxy.post, CHAT, body(stream=True))
        time.sleep(0.5)
        last = "b" * 16
        engine.status = status(last, calibration=OTHER, generation=3)
        eventually(lambda: last in proxy.admin("/metrics").text, 2)
        assert not answer.done()
        assert "error" not in answer.result().text


def test_a_guard_that_the_settings_do_not_allow_is_no_change_that_passes(changing: tuple[FakeEngine, Host]) -> None:
    engine, upstream = changing
    with hosted(create_app(settings_for(upstream.url, fingerprint=FINGERPRINT)), "on") as host:
        proxy = Proxy(host)
        assert proxy.post(CHAT, body()).status_code == 200
        change(engine, GUARDS["bank and calibration"])
        assert proxy.post(CHAT, body()).json()["error"]["code"] == "guard_unavailable"
        assert proxy.post(CHAT, body()).json()["error"]["code"] == "guard_unavailable"
        change(engine, (FINGERPRINT, CALIBRATION), 3)
        eventually(lambda: proxy.post(CHAT, body()).status_code == 200)


def test_evidence_of_a_calibration_that_the_engine_never_agreed_on_does_not_pass(
    changing: tuple[FakeEngine, Host],
) -> None:
    engine, upstream = changing
    with hosted(create_app(settings_for(upstream.url)), "on") as host:
        engine.script = Script(guard=(FINGERPRINT, OTHER))
        assert Proxy(host).post(CHAT, body()).status_code == 503


def test_an_idle_server_knows_of_a_change_within_two_seconds(
    changing: tuple[FakeEngine, Host], caplog: pytest.LogCaptureFixture
) -> None:
    engine, upstream = changing
    with hosted(create_app(settings_for(upstream.url)), "on") as host, caplog.at_level("INFO", "undertow.server"):
        assert Proxy(host).admin("/readyz").status_code == 200
        change(engine, GUARDS["calibration"])
        eventually(lambda: generations(caplog)[-1:] == [2], 2)
    assert generations(caplog)[-1] == 2


def generations(caplog: pytest.LogCaptureFixture) -> list[int]:
    lines = [record for record in caplog.records if record.getMessage() == "handshake with the engine"]
    return [record.__dict__["fields"]["generation"] for record in lines]


def eventually(true: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- the endpoint is vLLM's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RELOAD_PATH, RELOAD_PATH + "/", "/v1/..%2fundertow/reload", "//undertow/reload"])
def test_no_client_reaches_it_through_the_server(enforce: Proxy, engine: FakeEngine, path: str) -> None:
    engine.bodies.clear()
    answer = enforce.post(path, {}, {"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 404
    assert engine.bodies == []


# -- the token --------------------------------------------------------------------------------------------------------


def test_a_token_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert admin_token({}) is None
    assert admin_token({TOKEN_VARIABLE: TOKEN}) == TOKEN.encode()
    assert admin_token({TOKEN_FILE_VARIABLE: str(file)}) == TOKEN.encode()


@pytest.mark.parametrize("token", ["", "short canary", "canary" * 3 + "\n", "canary with spaces in", "canaryä" * 3])
def test_a_token_that_is_none_is_refused_and_not_repeated(token: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as caught:
        admin_token({TOKEN_VARIABLE: token})
    assert "canary" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        admin_token({TOKEN_FILE_VARIABLE: str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="both set"):
        admin_token({TOKEN_FILE_VARIABLE: "x", TOKEN_VARIABLE: TOKEN})


@pytest.mark.parametrize(("token", "pinned"), [(None, "sha256:started"), (TOKEN, None)])
def test_up_pins_the_bank_unless_it_can_be_changed(
    token: str | None, pinned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (TOKEN_VARIABLE, TOKEN_FILE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    arguments = argparse.Namespace(config=None, host=None, port=None, admin_port=None)
    assert up._settings(arguments, "http://127.0.0.1:1", "sha256:started")[0].upstream.fingerprint == pinned


# -- the command ------------------------------------------------------------------------------------------------------

WANTED = Wanted(fingerprint="sha256:" + "0" * 64, calibration="sha256:" + "1" * 64)
LOADED = Loaded(
    fingerprint=WANTED.fingerprint,
    calibration=WANTED.calibration,
    generation=7,
    changed=True,
    workers=2,
    prepared_s=0.25,
    paused_s=0.03,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, object]], list[Response]]]:
    """An engine's endpoint: its URL, what it was sent, and what it answers next."""
    seen: list[tuple[str, object]] = []
    answers: list[Response] = []

    async def reload(request: Request) -> Response:
        seen.append((request.headers["authorization"], await request.json()))
        return answers.pop()

    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setattr("server.commands.reload._wanted", lambda bank, calibration: WANTED)
    with hosted(Starlette(routes=[Route(RELOAD_PATH, reload, methods=["POST"])])) as host:
        yield host.url, seen, answers


def test_the_command_sends_digests_and_the_token_and_says_what_became_of_it(
    asked: tuple[str, list[tuple[str, object]], list[Response]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, seen, answers = asked
    answers.append(JSONResponse(LOADED.model_dump()))
    assert cli.main(["reload", "--calibration", "c", "--engine", url]) == 0
    assert seen == [(f"Bearer {TOKEN}", WANTED.model_dump())]
    out = capsys.readouterr().out
    assert "generation   7, on 2 workers: read in 0.25 s, paused for 0.03 s" in out
    assert TOKEN not in out


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (JSONResponse({"error": "c: made with dtype x"}, 409), "not changed: c: made with dtype x"),
        (JSONResponse({"error": "the admin token is missing or wrong"}, 401), "token is missing or wrong"),
        (Response("<html>", 502), "not changed: status 502"),
        (Response("", 404), "cannot be changed: started without UNDERTOW_ADMIN_TOKEN"),
    ],
)
def test_what_the_engine_does_not_take_is_said_with_its_reason(
    asked: tuple[str, list[tuple[str, object]], list[Response]],
    capsys: pytest.CaptureFixture[str],
    answer: Response,
    said: str,
) -> None:
    url, _, answers = asked
    answers.append(answer)
    assert cli.main(["reload", "--calibration", "c", "--engine", url]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert TOKEN not in err


def test_without_a_token_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(TOKEN_FILE_VARIABLE, raising=False)
    assert cli.main(["reload", "--calibration", "c"]) == 2
    assert "are not set; expected the engine's admin token" in capsys.readouterr().err
