"""`undertow serve`: the proxy alone, in front of a vLLM server that already runs."""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.config.origin import Origin
    from server.config.settings import Settings


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
    parser.add_argument("--admin-port", type=int, help="give operators this port instead")
    parser.add_argument("--upstream", metavar="URL", help="guard this vLLM server instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from server.config.origin import open_settings
    from server.config.settings import parse

    environ = dict(os.environ)
    flags = {
        "UNDERTOW_LISTEN_HOST": arguments.host,
        "UNDERTOW_LISTEN_PORT": arguments.port,
        "UNDERTOW_ADMIN_PORT": arguments.admin_port,
        "UNDERTOW_UPSTREAM_URL": arguments.upstream,
    }
    # A flag is checked as the variable of the same key is, and wins over it.
    environ.update({variable: str(value) for variable, value in flags.items() if value is not None})
    return run_server(*open_settings(arguments.config, lambda text: parse(text, str(arguments.config), environ)))


def run_server(settings: Settings, origin: Origin | None = None) -> int:
    """Run the proxy in this process until SIGINT or SIGTERM; returns the exit code. Prints the URL once it listens.
    `origin`: where the settings are from, to be read again at SIGHUP and as that changes.

    Call it from the main thread, under `signals.termination_as_interrupt`. Raises ConfigError where an address cannot
    be taken, or where the settings name a secret's variable that is not set.
    """
    from server.app import create_app
    from server.listeners import listen, make_server
    from server.signals import hangup_as
    from server.telemetry.logs import configure

    configure(settings.log.level)
    app = create_app(settings, origin=origin)
    with (
        hangup_as(app.reload.ask),
        listen(settings.listen.host, settings.listen.port, "listen") as listener,
        listen(settings.admin.host, settings.admin.port, "admin") as operators,
    ):
        print(f"undertow: listening on {_address(listener)}/v1 (Ctrl-C ends it)", file=sys.stderr)
        print(f"undertow: metrics and status on {_address(operators)}", file=sys.stderr)
        server = make_server(app, settings, operators)
        _spare_collector()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            # uvicorn has shut down in order and hands the signal on.
            return 0
    return 0


def _spare_collector() -> None:
    """Let the garbage collector leave alone what is here for good: going through all of it stops every request for some
    40 ms."""
    gc.collect()
    gc.freeze()


def _address(listener: socket.socket) -> str:
    from server.listeners import url

    host, port = listener.getsockname()[:2]
    return url(host, port)
