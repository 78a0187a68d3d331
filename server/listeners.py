"""The server's two ports, in one process and one loop: the clients' and the operators'.

server = make_server(app, settings)
server.run(sockets=...)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Generator

import uvicorn

from guard.errors import ConfigError
from server.app import Undertow
from server.config.sections import Limits, Shutdown
from server.config.settings import Settings
from server.connection import Connection, Patience
from server.drain import Drain
from server.graceful import GracefulServer, timeout_s

_ADMIN_GRACE_S = 1
_LIMITS = Limits()


def http_config(
    app: object, host: str, port: int, *, lifespan: bool, grace_s: int, limits: Limits = _LIMITS
) -> uvicorn.Config:
    """How both ports speak HTTP."""
    patience = Patience(limits.header_timeout_s, limits.body_timeout_s, limits.max_header_bytes, limits.max_connections)
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=host,
        port=port,
        loop="uvloop",
        http=functools.partial(Connection, patience=patience),  # type: ignore[arg-type]
        ws="none",
        lifespan="on" if lifespan else "off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=grace_s,
    )


class _Admin(uvicorn.Server):
    """Ends when it is told to, and leaves signals to the clients' server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class PairedServer(GracefulServer):
    """The clients' server. The operators' starts before it and ends after it: what happens while requests drain is
    still seen."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Drain,
        shutdown: Shutdown,
        admin: uvicorn.Config,
        admin_socket: socket.socket | None = None,
    ) -> None:
        super().__init__(config, drain, shutdown)
        self.admin = _Admin(admin)
        self._admin_sockets = None if admin_socket is None else [admin_socket]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._admin_task = asyncio.create_task(self.admin.serve(self._admin_sockets))
        while not self.admin.started and not self._admin_task.done():
            await asyncio.sleep(0.005)
        if self._admin_task.done():
            self._admin_task.result()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.admin.should_exit = True
        await self._admin_task


def make_server(app: Undertow, settings: Settings, admin_socket: socket.socket | None = None) -> PairedServer:
    """Both servers, not running yet. They leave logging to whoever runs them."""
    grace_s = timeout_s(settings.shutdown)
    return PairedServer(
        http_config(
            app, settings.listen.host, settings.listen.port, lifespan=True, grace_s=grace_s, limits=settings.limits
        ),
        app.drain,
        settings.shutdown,
        http_config(
            app.admin,
            settings.admin.host,
            settings.admin.port,
            lifespan=False,
            grace_s=_ADMIN_GRACE_S,
            limits=settings.limits,
        ),
        admin_socket,
    )


def listen(host: str, port: int, key: str) -> socket.socket:
    """A socket that listens. `key`: of the settings, for the message. Raises ConfigError where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {url(host, port)} (`{key}`): {error.strerror}") from error


def url(host: str, port: int) -> str:
    """As a client writes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
