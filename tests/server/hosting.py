"""Real uvicorn on a loopback port, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from server.app import Undertow
from server.config.sections import Limits, Shutdown
from server.listeners import PairedServer, http_config
from tests.ports import free_port


class Host:
    """An app on a port that it keeps when it is stopped and started again."""

    def __init__(self, app: ASGIApp, lifespan: str = "off", limits: Limits | None = None) -> None:
        self._app = app
        self._lifespan = lifespan
        self._limits = limits or Limits()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._admin_port = free_port()
        self.admin_url = f"http://127.0.0.1:{self._admin_port}"
        """Of a server; nobody listens there for other apps."""

    def start(self) -> None:
        config = http_config(
            self._app, "127.0.0.1", self.port, lifespan=self._lifespan == "on", grace_s=1, limits=self._limits
        )
        self._server = uvicorn.Server(config)
        if isinstance(self._app, Undertow):
            admin = http_config(
                self._app.admin, "127.0.0.1", self._admin_port, lifespan=False, grace_s=1, limits=self._limits
            )
            self._server = PairedServer(config, self._app.drain, Shutdown(), admin)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.005)

    def stop(self, at_once: bool = False) -> None:
        """End it; `at_once` as a killed process does, in the middle of answers."""
        if at_once and self._thread.is_alive():
            self._server.servers[0].get_loop().call_soon_threadsafe(self._abort)
        self._server.should_exit = True
        self._server.force_exit = at_once
        self._thread.join(10)

    def _abort(self) -> None:
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


@contextmanager
def hosted(app: ASGIApp, lifespan: str = "off", limits: Limits | None = None) -> Iterator[Host]:
    host = Host(app, lifespan, limits)
    host.start()
    try:
        yield host
    finally:
        host.stop()
