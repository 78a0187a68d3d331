"""The proxy, wired up: all of it on this page.

app = create_app(load(Path("configs/undertow.yaml"), os.environ))
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping

from fastapi import FastAPI

from guard.version import VERSION
from server.admin.access import operator_token
from server.admin.app import create_admin
from server.admin.incidents import incidents_router
from server.config.origin import Origin
from server.config.settings import Settings
from server.drain import Drain
from server.exchange import Gateway
from server.in_force import InForce, Live
from server.incidents.incidents import Incidents
from server.incidents.keeping import Keeping
from server.incidents.webhooks import Webhooks
from server.readiness import Readiness
from server.reload import Reload
from server.routes import build_router, install_error_handlers
from server.telemetry.metrics import Metrics
from server.telemetry.traces import Traces
from server.upstreams.engine import Engine
from server.upstreams.fleet import Fleet


class Undertow(FastAPI):
    """The clients' app."""

    admin: FastAPI
    """The operators', for a port of its own in the same loop."""
    drain: Drain
    """How it ends."""
    reload: Reload
    """How its settings change."""


def create_app(settings: Settings, environ: Mapping[str, str] = os.environ, origin: Origin | None = None) -> Undertow:
    """An app with its own metrics and its own connections. `environ` holds the secrets that the settings name.
    `origin`: where the settings are from, to be read again as that changes.

    Raises ConfigError where one of them is not set.
    """
    token = operator_token(settings.admin, environ)
    metrics = Metrics(VERSION)
    live = Live(InForce.of(settings, environ))
    fleet = Fleet(
        [Engine(name, each, live, environ, metrics) for name, each in settings.engines.items()], live, metrics
    )
    drain = Drain()
    keeping = Keeping.of(settings, environ, metrics)
    webhooks = Webhooks(settings.webhooks, environ, metrics)
    incidents = Incidents(keeping.recorder, webhooks)
    traces = Traces(settings.telemetry.traces, environ, VERSION)
    gateway = Gateway(live, fleet, drain, metrics, incidents=incidents, traces=traces)
    reload = Reload(origin, live, fleet, metrics)
    readiness = Readiness(fleet, drain, lambda: reload.report)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        keeping.start()
        watches = [asyncio.create_task(each) for each in (fleet.watch(), reload.watch(), webhooks.run())]
        yield
        for watch in watches:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        await fleet.aclose()
        await asyncio.to_thread(keeping.close)
        await asyncio.to_thread(traces.close)

    # What FastAPI would generate knows nothing of bodies that are read here: `server.openapi` does.
    app = Undertow(title="Undertow", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False
    app.include_router(build_router(gateway, readiness))
    install_error_handlers(app, metrics)
    app.drain = drain
    app.reload = reload
    app.admin = create_admin(metrics, readiness, token, live)
    if keeping.store is not None and keeping.recorder is not None:
        app.admin.include_router(incidents_router(keeping.store, keeping.recorder, metrics))
    return app
