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
from server.config.settings import Settings
from server.drain import Drain
from server.exchange import Gateway
from server.in_force import InForce, Live
from server.readiness import Readiness
from server.routes import build_router, install_error_handlers
from server.telemetry.metrics import Metrics
from server.upstreams.engine import Engine
from server.upstreams.fleet import Fleet


def create_app(settings: Settings, environ: Mapping[str, str] = os.environ) -> FastAPI:
    """An app with its own metrics and its own connections. `environ` holds the keys that `api_key_env` names.

    Raises ConfigError where such a variable is not set.
    """
    metrics = Metrics(VERSION)
    live = Live(InForce.of(settings))
    fleet = Fleet(
        [Engine(name, each, live, environ, metrics) for name, each in settings.engines.items()], live, metrics
    )
    drain = Drain()
    gateway = Gateway(live, fleet, drain, metrics)
    readiness = Readiness(fleet, drain)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(fleet.watch())
        yield
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await fleet.aclose()

    # No generated documentation: it would describe bodies that belong to vLLM.
    app = FastAPI(title="Undertow", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False
    app.include_router(build_router(gateway, readiness))
    install_error_handlers(app, metrics)
    app.state.drain = drain
    return app
