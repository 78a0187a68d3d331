"""Keys, tenants and quotas over sockets, and clients that are slow or send too much before they ask anything."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server import cli
from server.app import create_app
from server.config.sections import Limits
from server.config.settings import Settings

from .conftest import Proxy, settings_for
from .fake_engine import MODEL, FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, MESSAGES, chat_body
from .test_server_failures import eventually

PATHS = [CHAT, "/v1/completions", "/v1/models"]


def make_key(file: Path, tenant: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["keys", "create", "--file", str(file), "--tenant", tenant]) == 0
    return capsys.readouterr().out.strip()


@contextmanager
def served(settings: Settings, **changes: Any) -> Iterator[Proxy]:
    changed = Settings.model_validate({**settings.model_dump(exclude_unset=True), **changes})
    with hosted(create_app(changed), "on") as host:
        yield Proxy(host)


@pytest.fixture
def keyed(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[Proxy, str, str]]:
    """A proxy that asks for keys, one of the tenant lab, which is only watched, and one of shop."""
    file = tmp_path / "keys.json"
    lab, shop = make_key(file, "lab", capsys), make_key(file, "shop", capsys)
    rules = [{"match": {"tenant": "lab"}, "override": {"mode": "monitor"}}]
    quotas = {"shop": {"requests_per_minute": 5, "concurrent_streams": 1}}
    with served(
        settings_for(played[1].url), access={"keys_file": file, "tenants": quotas}, rules=rules, log={"level": "info"}
    ) as proxy:
        yield proxy, lab, shop


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", PATHS)
def test_without_a_key_nothing_is_told_or_asked(engine: FakeEngine, keyed: tuple[Proxy, str, str], path: str) -> None:
    proxy, lab, _ = keyed
    for said in ({}, bearer("utk_nothing"), bearer(lab[:-1]), {"authorization": lab}):
        with httpx.Client(base_url=proxy.url) as client:
            answer = client.request("GET" if path == "/v1/models" else "POST", path, headers=said, content=b"{")
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert lab[:-1] not in answer.text
    assert engine.bodies == []
    label = {CHAT: "chat_completions", "/v1/completions": "completions", "/v1/models": "models"}[path]
    assert proxy.sample("undertow_requests_total", endpoint=label, outcome="unauthorized") == 4


def test_a_key_is_refused_before_the_body_comes(keyed: tuple[Proxy, str, str]) -> None:
    port = keyed[0].host.port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        wire.sendall(f"{head}content-length: 50000\r\n\r\n".encode())
        assert wire.recv(4096).startswith(b"HTTP/1.1 401")


def test_the_tenants_policy_judges_and_the_key_goes_nowhere(
    engine: FakeEngine, keyed: tuple[Proxy, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    proxy, lab, shop = keyed
    engine.script = Script(blocked={0: 0})

    def logged() -> list[tuple[object, object]]:
        found = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "request"]
        return [(each["tenant"], each["key"]) for each in found]

    with caplog.at_level("INFO"):
        watched = proxy.post(CHAT, chat_body(), bearer(lab))
        assert eventually(lambda: logged() == [("lab", lab.split("_")[1])])
        judged = proxy.post(CHAT, chat_body(), bearer(shop))
        # A request is logged after its answer was sent.
        assert eventually(lambda: logged()[1:] == [("shop", shop.split("_")[1])])
    assert watched.status_code == 200
    assert judged.status_code == 400
    assert all("authorization" not in {name.lower() for name in headers} for headers in engine.headers)
    told = repr([record.__dict__ for record in caplog.records]) + proxy.admin("/metrics").text
    for key in (lab, shop):
        assert key.split("_", 2)[2] not in told


def test_a_quota_that_is_used_up_is_a_429_that_clients_wait_for(
    engine: FakeEngine, keyed: tuple[Proxy, str, str]
) -> None:
    proxy, lab, shop = keyed
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=shop, max_retries=0)
    for left in (4, 3, 2, 1, 0):
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)  # type: ignore[call-overload]
        assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(model=MODEL, messages=MESSAGES)  # type: ignore[call-overload]
    assert raised.value.code == "rate_limit_exceeded"
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 12
    assert proxy.sample("undertow_rate_limited_total", limit="requests_per_minute") == 1
    assert proxy.sample("undertow_requests_total", endpoint="chat_completions", outcome="rate_limited") == 1
    assert proxy.post(CHAT, chat_body(), bearer(lab)).status_code == 200, "another key has its own"


def test_a_second_stream_of_a_key_waits_until_the_first_has_ended(
    engine: FakeEngine, keyed: tuple[Proxy, str, str]
) -> None:
    proxy, _, shop = keyed
    engine.script = Script(tokens=("word",) * 40, token_delay_s=0.02)
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=shop, max_retries=0)
    with client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:  # type: ignore[call-overload]
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="concurrent streams"):
            client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)  # type: ignore[call-overload]
    deadline = time.monotonic() + 5
    while True:
        try:
            assert list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))  # type: ignore[call-overload]
            break
        except openai.RateLimitError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_tokens_are_charged_as_the_engine_counted_them(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    key = make_key(file, "lab", capsys)
    access = {"keys_file": file, "limits": {"tokens_per_minute": 1000}}
    with served(settings_for(played[1].url), access=access) as proxy:
        first = proxy.post(CHAT, chat_body(), bearer(key))
        spent = first.json()["usage"]["total_tokens"]
        second = proxy.post(CHAT, chat_body(stream=True), bearer(key))
        third = proxy.post(CHAT, chat_body(), bearer(key))
        assert first.headers["x-ratelimit-remaining-tokens"] == "1000"
        assert 0 <= int(second.headers["x-ratelimit-remaining-tokens"]) - (1000 - spent) <= 2
        assert 0 <= int(third.headers["x-ratelimit-remaining-tokens"]) - (1000 - 2 * spent) <= 4


@pytest.fixture
def hurried(engine: FakeEngine, played: tuple[FakeEngine, Host]) -> Iterator[Host]:
    limits = Limits(header_timeout_s=0.4, body_timeout_s=0.4, max_header_bytes=8192, max_connections=6)
    settings = settings_for(played[1].url).model_copy(update={"limits": limits})
    with hosted(create_app(settings), "on", limits) as host:
        yield host


def until_closed(
    wire: socket.socket, drip: bytes = b"", every_s: float = 0.1, at_most_s: float = 5.0
) -> tuple[bytes, float]:
    """What comes back, and the seconds until the connection ends, while `drip` is sent byte by byte."""
    began, got = time.monotonic(), b""
    wire.settimeout(every_s)
    left = iter(drip)
    while time.monotonic() - began < at_most_s:
        try:
            byte = next(left, None)
            if byte is not None:
                wire.sendall(bytes([byte]))
            part = wire.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return got, time.monotonic() - began
        if not part:
            return got, time.monotonic() - began
        got += part
    raise AssertionError(f"still open after {at_most_s} s")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_connection_that_says_nothing_ends(hurried: Host) -> None:
    with socket.create_connection(("127.0.0.1", hurried.port)) as wire:
        got, seconds = until_closed(wire)
    assert (got, 0.3 < seconds < 3) == (b"", True)


def test_headers_that_drip_end_with_408(hurried: Host) -> None:
    with socket.create_connection(("127.0.0.1", hurried.port)) as wire:
        got, seconds = until_closed(wire, HEAD)
    assert got.startswith(b"HTTP/1.1 408")
    assert seconds < 3


def test_a_body_that_drips_ends_with_408_and_goes_on_dripping_in_vain(hurried: Host) -> None:
    with socket.create_connection(("127.0.0.1", hurried.port)) as wire:
        wire.sendall(HEAD + b"content-length: 5000\r\n\r\n")
        got, seconds = until_closed(wire, b"{" * 5000)
    assert got.startswith(b"HTTP/1.1 408")
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    assert seconds < 4


def test_headers_without_an_end_are_not_kept(hurried: Host) -> None:
    with socket.create_connection(("127.0.0.1", hurried.port)) as wire:
        wire.sendall(HEAD + b"x: " + b"a" * 9000)
        got, _ = until_closed(wire)
    assert got.startswith(b"HTTP/1.1 431")


def test_more_connections_than_there_may_be_are_closed_and_the_others_served(hurried: Host) -> None:
    with socket.create_connection(("127.0.0.1", hurried.port)) as first:
        crowd = [socket.create_connection(("127.0.0.1", hurried.port)) for _ in range(8)]
        first.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        first.settimeout(5)
        assert first.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        closed = 0
        for each in crowd:
            each.settimeout(0.02)
            try:
                closed += each.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                closed += 1
            each.close()
    assert closed >= 3


def test_a_request_that_takes_long_to_answer_is_not_ended(engine: FakeEngine, hurried: Host) -> None:
    engine.script = Script(tokens=("word",) * 20, token_delay_s=0.1)
    with httpx.Client(base_url=hurried.url, timeout=10) as client:
        answer = client.post(CHAT, json=chat_body(stream=True))
        assert answer.text.endswith("data: [DONE]\n\n")
        assert client.get("/healthz").status_code == 200
