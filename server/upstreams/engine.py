"""One engine: how it is reached, what was agreed on with it, and whether requests may be sent to it.

engine = Engine("gpu-1", settings, live, environ, metrics)
handshake = engine.ready_for(ruling)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

from guard.errors import EngineError
from server.config.upstream import UpstreamSettings
from server.errors import GuardFailure, UpstreamError
from server.in_force import Live
from server.ruling import Ruling
from server.telemetry.logs import LOGGER
from server.telemetry.metrics import Metrics
from server.upstreams.breaker import Breaker
from server.upstreams.canary import Canary, send_canary
from server.upstreams.handshake import Handshake, HandshakeKeeper
from server.upstreams.upstream import SmallAnswer, Upstream

Standing = Literal["well", "doubtful", "out"]
"""Of an engine for one request. doubtful: it would be judged, but another one is better. out: not to be asked."""

_CHECK_S = 3.0
"""How old a report may be, so that the probes of many load balancers stay cheap."""
_DOUBT_S = 5.0
"""Between canaries that answers which could not be judged give cause for: a client may know how to make such."""
_MODELS_S = 5.0
_MODELS_TIMEOUT_S = 5.0
_AGAIN_S = 1.0
_SILENCES = 3
"""Questions for its status that an engine leaves unanswered before others are preferred."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What of an engine is ready. Reasons are sentences for an operator, by the check that failed."""

    checks: Mapping[str, str | None]
    canary: Canary | None = None
    """The last one that was sent; None where none was yet."""

    @property
    def ready(self) -> bool:
        return not any(self.checks.values())


class Engine:
    """Holds connections; `watch` must run, and `aclose` ends them. Raises ConfigError where its key is not set."""

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        live: Live,
        environ: Mapping[str, str],
        metrics: Metrics,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called when it may be asked again, or no more."""
        self.name = name
        self.inflight = 0
        """Requests that it works on for this server."""
        self.most = settings.max_connections
        self.models: frozenset[str] | None = None if settings.models is None else frozenset(settings.models)
        """Names that requests may give as their model; None where the engine has not told them."""
        self.chosen = settings.models is not None
        """Whether the settings say which models it is asked for."""
        self.upstream = Upstream(name, settings, environ)
        self.keeper = HandshakeKeeper(
            name, self.upstream, lambda: live.now.rulings.in_force(), settings.fingerprint, self._agreed
        )
        self.breaker = Breaker()
        self.canary: Canary | None = None
        """The last one since the handshake; None before."""
        self._live = live
        self._metrics = metrics
        self._woken = asyncio.Event()
        self._due = math.inf
        self._checking = asyncio.Lock()
        self._report = EngineReport({})
        self._until = -math.inf
        self._sent = -math.inf
        metrics.engine(name, lambda: self.well, lambda: self.inflight, lambda: self.breaker.open)

    def ready_for(self, ruling: Ruling) -> Handshake | None:
        """The handshake that a request would be judged by; None where it could not be."""
        return self.keeper.current

    def why_not(self, ruling: Ruling) -> EngineError | UpstreamError:
        """Why `ready_for` has none: EngineError where the engine answers, but is not guarded as it should be."""
        if self.breaker.open:
            return UpstreamError("connect", f"engine {self.name} is left alone: several requests in a row failed")
        return self.keeper.error

    def standing(self, ruling: Ruling) -> Standing:
        """Whether to ask it. `out` where its guard is not what the settings ask for, or its breaker is open."""
        if self.breaker.open or self.ready_for(ruling) is None:
            return "out"
        return "well" if self.well else "doubtful"

    @property
    def well(self) -> bool:
        """It is asked before others: guarded as the settings say, answering, its last canary scored."""
        canary_failed = self.canary is not None and self.canary.reason is not None
        return (
            self.keeper.current is not None
            and not self.breaker.open
            and not canary_failed
            and self.keeper.silences < _SILENCES
        )

    def failed(self, error: UpstreamError) -> None:
        """It did not answer, or stopped in the middle of an answer."""
        self._metrics.engine_failed(self.name, error.kind)
        if error.kind in ("connect", "cut"):
            # It may come back with another bank.
            self.keeper.drop(error.detail)
        # What one request meets alone (500, a client's own mistake) says little of the engine; a canary says more.
        if error.kind == "status":
            self._doubt()
        elif error.kind in ("connect", "cut", "timeout") and self.breaker.failed():
            self._probe_at(monotonic())
            self.on_change()

    def answered(self) -> None:
        """It answered, and to the end."""
        self.breaker.succeeded()

    def unjudged(self, failure: GuardFailure) -> None:
        """It answered, but the request could not be judged."""
        self._metrics.engine_failed(self.name, failure.kind)
        if failure.kind == "fingerprint":
            self.keeper.drop(failure.detail)
        self._doubt()

    async def check(self) -> EngineReport:
        """Status, handshake and a canary, in this order; at most a few seconds old."""
        async with self._checking:
            if monotonic() >= self._until:
                self._report = await self._check()
                self._until = monotonic() + _CHECK_S
            return self._report

    async def watch(self, discovers: bool) -> None:
        """Keep handshake and health up to date, forever. `discovers`: ask which models it serves."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forever(self.keeper.watch))
            tasks.create_task(self._forever(self._watch_health))
            if discovers and not self.chosen:
                tasks.create_task(self._forever(self._watch_models))

    async def ask_models(self, authorization: str | None = None) -> SmallAnswer:
        """Its `/v1/models`. Raises UpstreamError."""
        return await self.upstream.get("/v1/models", authorization, _MODELS_TIMEOUT_S)

    async def aclose(self) -> None:
        await self.upstream.aclose()

    async def _check(self) -> EngineReport:
        checks: dict[str, str | None] = {"upstream": None, "guard": None, "canary": None}
        unknown = "not tried"
        try:
            handshake = await self.keeper.refresh()
        except UpstreamError as error:
            return EngineReport({"upstream": error.detail, "guard": unknown, "canary": unknown}, self.canary)
        except EngineError as error:
            return EngineReport({**checks, "guard": str(error), "canary": unknown}, self.canary)
        canary = await self._probe(handshake)
        return EngineReport({**checks, "canary": canary.reason}, canary)

    async def _probe(self, handshake: Handshake) -> Canary:
        canary = await send_canary(self.upstream, self.keeper, self._live.now.rulings.default.policy, handshake)
        self._sent = monotonic()
        self._metrics.canary(self.name, scored=canary.reason is None)
        if self.keeper.current is not None:
            self.canary = canary
            self.on_change()
        return canary

    def _agreed(self, handshake: Handshake | None) -> None:
        self._metrics.loaded(self.name, (handshake.fingerprint if handshake else None) or "")
        self.canary = None
        if handshake is not None:
            self._probe_at(monotonic())
        self.on_change()

    def _doubt(self) -> None:
        self._probe_at(max(monotonic(), self._sent + _DOUBT_S))

    def _probe_at(self, due: float) -> None:
        """A canary at this moment, if none is due before."""
        self._due = min(self._due, due)
        self._woken.set()

    async def _watch_health(self) -> None:
        """Send the canaries that are due; while none comes through, another one after a while."""
        while True:
            self._woken.clear()
            if (left := self._due - monotonic()) > 0:
                # Woken, it looks again: one may be due earlier.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), None if math.isinf(left) else left)
                continue
            self._due = math.inf
            handshake = self.keeper.current
            if handshake is None and not self.breaker.open:
                continue  # as soon as there is one, a canary is due
            handshake = handshake or await self._handshake()
            well = handshake is not None and (await self._probe(handshake)).reason is None
            if (pause := self.breaker.probed(well)) is not None:
                self._probe_at(monotonic() + pause)
            self.on_change()

    async def _handshake(self) -> Handshake | None:
        try:
            return await self.keeper.get()
        except (EngineError, UpstreamError):
            return None

    async def _watch_models(self) -> None:
        while True:
            await self._read_models()
            # Asked for soon where it is not known: until then it is asked for any.
            await asyncio.sleep(_MODELS_S if self.models is not None else _AGAIN_S)

    async def _read_models(self) -> None:
        try:
            answer = await self.ask_models()
        except UpstreamError:
            return  # the handshake's watch says so
        entries = model_entries(answer.content) if answer.status_code == 200 else None
        if entries is not None and (names := frozenset(entry["id"] for entry in entries)) != self.models:
            self.models = names
            self.on_change()

    async def _forever(self, work: Callable[[], Awaitable[None]]) -> None:
        """A fault in a watch must not end it: nobody would look at this engine again."""
        while True:
            try:
                await work()
            except Exception:  # noqa: BLE001
                LOGGER.exception("fault", extra={"fields": {"engine": self.name}})
            await asyncio.sleep(_AGAIN_S)


def model_entries(content: bytes) -> list[dict[str, Any]] | None:
    """The models in an answer to `/v1/models`; None where it is not of OpenAI's shape."""
    try:
        entries = json.loads(content)["data"]
        good = all(isinstance(entry["id"], str) for entry in entries)
    except (ValueError, KeyError, TypeError):
        return None
    return entries if good else None
