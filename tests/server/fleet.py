"""Several fake engines on real sockets, and a proxy before them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from server.app import create_app
from server.config.incidents import IncidentSettings
from server.config.policies import PolicySettings
from server.config.sections import Limits
from server.config.settings import Settings
from server.config.upstream import UpstreamSettings

from .conftest import Proxy
from .fake_engine import FakeEngine
from .hosting import Host, hosted
from .relay import Relay, relayed


@dataclass
class Several:
    """Fake engines by name, and a proxy before them."""

    engines: dict[str, FakeEngine]
    hosts: dict[str, Host]
    relays: dict[str, Relay]
    proxy: Proxy = field(init=False)
    running: int = 0
    """Requests that a test keeps running on purpose."""

    def asked(self) -> dict[str, int]:
        """Completion requests that each was sent."""
        return {name: len(engine.bodies) for name, engine in self.engines.items()}

    def metric(self, name: str, **labels: str) -> float:
        return self.proxy.sample(name, running=self.running, **labels)

    def errors(self, name: str, kind: str) -> float:
        return self.metric("undertow_engine_errors_total", engine=name, kind=kind)

    def ready(self, name: str) -> bool:
        return self.metric("undertow_engine_ready", engine=name) == 1


@contextmanager
def several(
    *names: str,
    mode: str = "enforce",
    limits: Limits | None = None,
    behind_relays: bool = False,
    **upstream: dict[str, object],
) -> Iterator[Several]:
    """Engines that run, and a proxy that has found them all ready. `upstream`: further settings by engine."""
    engines = {name: FakeEngine() for name in names}
    hosts = {name: Host(engine.app) for name, engine in engines.items()}
    with ExitStack() as stack:
        for host in hosts.values():
            host.start()
        # Beside each other, at the end: uvicorn takes its time.
        ends = [threading.Thread(target=host.stop, args=(True,)) for host in hosts.values()]
        for end in ends:
            stack.callback(end.join)
        for end in ends:
            stack.callback(end.start)
        relays = {name: stack.enter_context(relayed(host.url)) for name, host in hosts.items() if behind_relays}
        settings = Settings(
            version=1,
            upstreams={
                name: UpstreamSettings.model_validate(
                    {
                        "url": (relays[name] if behind_relays else host).url,
                        "read_timeout_s": 4,
                        "connect_timeout_s": 5,
                        **upstream.get(name, {}),
                    }
                )
                for name, host in hosts.items()
            },
            policy=PolicySettings.model_validate({"mode": mode}),
            incidents=IncidentSettings(path=None),
            limits=limits or Limits(engine_wait_s=1),
        )
        found = Several(engines, hosts, relays)
        found.proxy = Proxy(stack.enter_context(hosted(create_app(settings), "on")))
        eventually(lambda: all(found.ready(name) for name in names))
        yield found


def eventually(true: Callable[[], bool], within_s: float = 8.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
