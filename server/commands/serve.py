"""`undertow serve`: the proxy alone, in front of a vLLM server that already runs."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import ConfigError

if TYPE_CHECKING:
    from server.config.sections import Listen
    from server.config.settings import Settings
    from server.graceful import GracefulServer


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="run the proxy in front of a running vLLM server",
        description="Run the proxy alone, in front of a vLLM server that has Undertow's worker and middleware loaded. "
        "`undertow up` starts both.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings, as configs/undertow.yaml")
    parser.add_argument("--host", help="listen here instead")
    parser.add_argument("--port", type=int, help="listen on this port instead")
    parser.add_argument("--upstream", metavar="URL", help="guard this vLLM server instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from server.config.settings import load

    environ = dict(os.environ)
    flags = {
        "UNDERTOW_LISTEN_HOST": arguments.host,
        "UNDERTOW_LISTEN_PORT": arguments.port,
        "UNDERTOW_UPSTREAM_URL": arguments.upstream,
    }
    # A flag is checked as the variable of the same key is, and wins over it.
    environ.update({variable: str(value) for variable, value in flags.items() if value is not None})
    return run_server(load(arguments.config, environ))


def run_server(settings: Settings) -> int:
    """Run the proxy in this process until SIGINT or SIGTERM; returns the exit code. Prints the URL once it listens.

    Call it from the main thread, under `signals.termination_as_interrupt`. Raises ConfigError where the address cannot
    be taken, or where the settings name a key's variable that is not set.
    """
    from server.telemetry.logs import configure

    configure(settings.log.level)
    server = make_server(settings)
    with _listen(settings.listen) as listener:
        host, port = listener.getsockname()[:2]
        print(f"undertow: listening on {_url(host, port)}/v1 (Ctrl-C ends it)", file=sys.stderr)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            # uvicorn has shut down in order and hands the signal on.
            return 0
    return 0


def make_server(settings: Settings) -> GracefulServer:
    """The proxy's HTTP server, not running yet; it leaves logging and signals to whoever runs it.

    Raises ConfigError where the settings name a key's variable that is not set.
    """
    import uvicorn

    from server.app import create_app
    from server.graceful import GracefulServer, timeout_s

    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.listen.host,
        port=settings.listen.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=timeout_s(settings.shutdown),
    )
    return GracefulServer(config, app.state.drain, settings.shutdown)


def _listen(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {_url(listen.host, listen.port)}: {error.strerror}") from error


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
