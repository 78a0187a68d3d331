"""Messages about incidents: signed, to named hosts only, and never in the way of a request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from guard.errors import ConfigError
from server.config.settings import parse
from server.config.webhooks import Webhooks as WebhookSettings
from server.incidents.webhooks import Webhooks, forbidden
from server.telemetry.metrics import Metrics
from tests.server.fake_engine import FakeEngine, Script
from tests.server.hosting import Host, hosted
from tests.server.test_server_answers import CHAT, chat_body

from .conftest import incident
from .test_incidents_served import served
from .test_recorder import eventually, value

SECRET = "webhook-secret-0123"
ENVIRON = {"UNDERTOW_WEBHOOK_SECRET": SECRET}


@dataclass
class Receiver:
    """Whoever is told."""

    statuses: list[int] = field(default_factory=list)
    """Of the next answers; 200 after them."""
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        self.got.append((request.url.path, dict(request.headers), await request.body()))
        status = self.statuses.pop(0) if self.statuses else 200
        return RedirectResponse("/elsewhere", 307) if status == 307 else Response(status_code=status)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])


@pytest.fixture
def receiver() -> Iterator[tuple[Receiver, str]]:
    found = Receiver()
    with hosted(found.app) as host:
        yield found, host.url


def settings(url: str, **more: Any) -> WebhookSettings:
    return WebhookSettings.model_validate({"hosts": ["127.0.0.1"], "send": [{"url": f"{url}/hook", **more}]})


@contextlib.asynccontextmanager
async def sending(wanted: WebhookSettings, pauses_s: tuple[float, ...] = (0.01, 0.01)) -> AsyncIterator[Any]:
    metrics = Metrics("test")
    webhooks = Webhooks(wanted, ENVIRON, metrics, pauses_s=pauses_s)
    task = asyncio.create_task(webhooks.run())
    try:
        yield webhooks, metrics
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def counted(metrics: Metrics, result: str, count: int) -> None:
    deadline = time.monotonic() + 5
    while value(metrics, "undertow_webhook_messages_total", result=result) != count:
        assert time.monotonic() < deadline, metrics.expose().decode()
        await asyncio.sleep(0.01)


async def test_a_message_is_signed_and_holds_nothing_that_a_client_wrote(receiver: tuple[Receiver, str]) -> None:
    found, url = receiver
    one = incident(content_kind="full", content='{"prompt": "private"}', key="3f0c2a91d7be")
    async with sending(settings(url)) as (webhooks, metrics):
        webhooks.offer(one)
        await counted(metrics, "sent", 1)
    ((path, headers, body),) = found.got
    assert path == "/hook"
    at, _, signed = headers["x-undertow-signature"].partition(",")
    seconds = at.removeprefix("t=")
    assert abs(time.time() - int(seconds)) < 30
    expected = hmac.new(SECRET.encode(), seconds.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert signed == f"v1={expected}"
    assert b"private" not in body
    assert SECRET.encode() not in body
    told = json.loads(body)
    assert told["incident"]["id"] == one.id
    assert told["text"].startswith("block: density in the prompt")
    assert not {"content", "sequences", "key"} & told["incident"].keys()


async def test_only_the_actions_that_are_wanted_are_sent(receiver: tuple[Receiver, str]) -> None:
    found, url = receiver
    async with sending(settings(url, actions=["flag"])) as (webhooks, metrics):
        webhooks.offer(incident(action="block"))
        webhooks.offer(incident(action="flag"))
        await counted(metrics, "sent", 1)
    assert [json.loads(body)["incident"]["action"] for _, _, body in found.got] == ["flag"]


async def test_what_fails_is_tried_again_and_then_given_up_and_counted(
    receiver: tuple[Receiver, str], caplog: pytest.LogCaptureFixture
) -> None:
    found, url = receiver
    found.statuses = [500, 429]
    async with sending(settings(url)) as (webhooks, metrics):
        webhooks.offer(incident(1))
        await counted(metrics, "sent", 1)
        assert len(found.got) == 3
        found.statuses = [500] * 3
        webhooks.offer(incident(2))
        await counted(metrics, "failed", 1)
        webhooks.offer(incident(3))
        await counted(metrics, "sent", 2)
    (line,) = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "webhook failed"]
    assert line == {"host": "127.0.0.1", "reason": "it answered 500"}, "a path may be as good as a password"


async def test_a_redirect_is_not_followed(receiver: tuple[Receiver, str]) -> None:
    found, url = receiver
    found.statuses = [307] * 3
    async with sending(settings(url)) as (webhooks, metrics):
        webhooks.offer(incident())
        await counted(metrics, "failed", 1)
    assert {path for path, _, _ in found.got} == {"/hook"}


async def test_what_waits_is_bounded_and_nobody_waits_for_it(receiver: tuple[Receiver, str]) -> None:
    wanted = settings(receiver[1])
    metrics = Metrics("test")
    webhooks = Webhooks(wanted, ENVIRON, metrics)
    for number in range(1100):
        webhooks.offer(incident(number))
    assert value(metrics, "undertow_webhook_messages_total", result="dropped") == 100


@pytest.mark.parametrize(
    ("host", "address", "no"),
    [
        ("hooks.example.com", "93.184.216.34", False),
        ("hooks.internal", "10.1.2.3", False),
        ("hooks.example.com", "127.0.0.1", True),
        ("hooks.example.com", "::1", True),
        ("hooks.example.com", "0.0.0.0", True),
        ("hooks.example.com", "169.254.169.254", True),
        ("hooks.example.com", "::ffff:169.254.169.254", True),
        ("hooks.example.com", "fe80::1%eth0", True),
        ("hooks.example.com", "224.0.0.1", True),
        ("localhost", "127.0.0.1", False),
        ("localhost", "169.254.169.254", True),
    ],
)
def test_where_clouds_keep_secrets_nothing_is_sent(host: str, address: str, no: bool) -> None:
    assert forbidden(host, address) is no


async def test_a_name_that_means_this_machine_is_not_asked(
    receiver: tuple[Receiver, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, url = receiver
    port = int(url.rpartition(":")[2])

    async def resolve(self: object, host: str, port: int = 0, family: Any = 0) -> list[dict[str, Any]]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr("aiohttp.resolver.ThreadedResolver.resolve", resolve)
    monkeypatch.setattr("server.incidents.webhooks.DefaultResolver.resolve", resolve)
    wanted = WebhookSettings.model_validate(
        {"hosts": ["hooks.example.com"], "send": [{"url": f"https://hooks.example.com:{port}/hook"}]}
    )
    async with sending(wanted) as (webhooks, metrics):
        webhooks.offer(incident())
        await counted(metrics, "failed", 1)
    assert found.got == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{send: [{url: 'https://a.example/x'}]}",
            "`webhooks.send.0.url` is at a.example; expected one of `webhooks.hosts`",
        ),
        ("{hosts: [a.example], send: [{url: 'http://a.example/x'}]}", "expected https:// for another machine"),
        ("{hosts: [a.example], send: [{url: 'https://u:p4ss@a.example/x'}]}", "holds credentials (not shown)"),
        ("{hosts: [a.example], send: [{url: 'ftp://a.example/x'}]}", "expected https://HOST/PATH"),
        ("{hosts: ['*'], send: []}", "`webhooks.hosts.0`"),
        ("{hosts: [a.example], send: [{url: 'https://a.example/x', actions: []}]}", "`webhooks.send.0.actions`"),
    ],
)
def test_a_webhook_that_is_none_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f"version: 1\nwebhooks: {text}", "x.yaml", {})
    assert said in str(raised.value)
    assert "p4ss" not in str(raised.value)


def test_without_its_secret_there_is_no_webhook() -> None:
    with pytest.raises(
        ConfigError, match=r"`webhooks\.send\.0\.secret_env` names UNDERTOW_WEBHOOK_SECRET, which is not"
    ):
        Webhooks(settings("http://127.0.0.1:9"), {}, Metrics("test"))


def test_a_blocked_request_is_told_and_not_delayed(
    receiver: tuple[Receiver, str], engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    found, url = receiver
    engine.script = Script(blocked={0: 0})
    wanted = settings(url).model_dump()
    with served(played[1].url, tmp_path, ENVIRON, webhooks=wanted) as proxy:
        assert proxy.post(CHAT, chat_body()).status_code == 400
        assert eventually(lambda: len(found.got) == 1)
        engine.script = Script()
        proxy.post(CHAT, chat_body())
        time.sleep(0.2)
    assert len(found.got) == 1
