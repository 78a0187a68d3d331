"""A fake engine and real proxies before it, one for each mode, on real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from guard.policy import Mode
from server.app import create_app
from server.config.incidents import IncidentSettings
from server.config.policies import PolicySettings
from server.config.sections import Limits
from server.config.settings import Settings
from server.config.upstream import UpstreamSettings

from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted

KEY = "sk-canary-5b0c1f"
"""Sent by every client; must be found nowhere."""


@dataclass(frozen=True)
class Proxy:
    """One proxy, and three ways to talk to it."""

    host: Host

    @property
    def url(self) -> str:
        return self.host.url

    def openai(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **options)  # type: ignore[arg-type]

    # Nothing here is encrypted, and a client that verifies reads every certificate authority when it is made.
    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
        """A whole answer."""
        with httpx.Client(base_url=self.url, timeout=10, verify=False) as client:
            return client.post(path, json=body, headers={"authorization": f"Bearer {KEY}", **(headers or {})})

    def get(self, path: str) -> httpx.Response:
        """As a client."""
        with httpx.Client(base_url=self.url, timeout=15, verify=False) as client:
            return client.get(path)

    def admin(self, path: str, **headers: str) -> httpx.Response:
        """As an operator."""
        with httpx.Client(base_url=self.host.admin_url, timeout=15, verify=False) as client:
            return client.get(path, headers=headers)

    def sample(self, name: str, *, running: int = 0, **labels: str) -> float:
        """One metric's value, 0 where it has none; once no more than `running` requests are worked on, if that comes
        soon: clients have their answers before these are counted."""
        deadline = time.monotonic() + 1
        while True:
            found = samples(self.admin("/metrics").text)
            if found[("undertow_inflight_requests", frozenset())] <= running or time.monotonic() > deadline:
                return found.get((name, frozenset(labels.items())), 0.0)
            time.sleep(0.01)


def samples(exposition: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def settings_for(url: str, mode: Mode = "enforce", **upstream: object) -> Settings:
    return Settings(
        version=1,
        upstream=UpstreamSettings(url=url, read_timeout_s=4, connect_timeout_s=5, **upstream),  # type: ignore[arg-type]
        policy=PolicySettings(mode=mode),
        incidents=IncidentSettings(path=None),
        limits=Limits(max_body_bytes=100_000, body_timeout_s=1),
    )


@pytest.fixture(scope="session")
def played() -> Iterator[tuple[FakeEngine, Host]]:
    engine = FakeEngine()
    with hosted(engine.app) as host:
        yield engine, host


@pytest.fixture
def engine(played: tuple[FakeEngine, Host]) -> FakeEngine:
    engine, _ = played
    engine.script = Script()
    engine.bodies.clear()
    engine.headers.clear()
    engine.aborted = engine.sent = 0
    return engine


@pytest.fixture(scope="session")
def proxies(played: tuple[FakeEngine, Host]) -> Iterator[dict[Mode, Proxy]]:
    _, upstream = played
    with (
        hosted(create_app(settings_for(upstream.url, "enforce")), "on") as enforce,
        hosted(create_app(settings_for(upstream.url, "monitor")), "on") as monitor,
        hosted(create_app(settings_for(upstream.url, "off")), "on") as off,
    ):
        yield {"enforce": Proxy(enforce), "monitor": Proxy(monitor), "off": Proxy(off)}


@pytest.fixture
def enforce(engine: FakeEngine, proxies: dict[Mode, Proxy]) -> Proxy:
    return proxies["enforce"]


@pytest.fixture
def monitor(engine: FakeEngine, proxies: dict[Mode, Proxy]) -> Proxy:
    return proxies["monitor"]


@pytest.fixture
def off(engine: FakeEngine, proxies: dict[Mode, Proxy]) -> Proxy:
    return proxies["off"]


@pytest.fixture
def alone(engine: FakeEngine, played: tuple[FakeEngine, Host]) -> Iterator[Proxy]:
    """A proxy of this test only, in enforce: its metrics start at 0 and nobody else drops its handshake."""
    with hosted(create_app(settings_for(played[1].url)), "on") as host:
        yield Proxy(host)
