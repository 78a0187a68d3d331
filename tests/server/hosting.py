"""Real uvicorn on a loopback port, in a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp


class Host:
    """An app on a port that it keeps when it is stopped and started again."""

    def __init__(self, app: ASGIApp, lifespan: str = "off") -> None:
        self._app = app
        self._lifespan = lifespan
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = uvicorn.Config(
            self._app,
            host="127.0.0.1",
            port=self.port,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan=self._lifespan,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
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
def hosted(app: ASGIApp, lifespan: str = "off") -> Iterator[Host]:
    host = Host(app, lifespan)
    host.start()
    try:
        yield host
    finally:
        host.stop()
