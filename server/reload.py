"""Settings that change while the server runs: everything that they say, or nothing.

reload = Reload(origin, live, fleet, metrics)
reload.ask()              # as SIGHUP does
await reload.watch()      # and as the file changes, forever

A file is read, checked and built before anything of it holds, and engines are asked whether they can judge by its
policies. Then `Live.now` is set once: docs/decisions/0023-settings-reload.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import monotonic, sleep
from typing import Any

from guard.errors import ConfigError, EngineError, InputError
from guard.policy import Policy
from server.config.file import look
from server.config.fixed import moved
from server.config.origin import Origin
from server.in_force import InForce, Live
from server.settled import Settled
from server.telemetry.logs import LOGGER, log, set_level
from server.telemetry.metrics import Metrics
from server.upstreams.fleet import Fleet
from server.upstreams.handshake import HandshakeError, check_policies

_STILL_S = 0.1
"""In which a file must not change after it was read: who asks may ask too early."""
_AGAIN_S = 5.0
"""Until a file is tried again that an engine stood against: it may come, or be calibrated, meanwhile."""


@dataclass(frozen=True, slots=True)
class SettingsReport:
    """Which settings hold, for operators."""

    sha256: str
    """Of the file that they are from; empty where they are from none."""
    since: str
    """When they were taken, in UTC, as ISO 8601."""
    refused: str | None = None
    """Why the file, as it is now, was not taken; None where it holds."""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Reload:
    """Reads the settings again; `watch` must run."""

    def __init__(self, origin: Origin | None, live: Live, fleet: Fleet, metrics: Metrics) -> None:
        """`origin`: of what is in force; None where that came from no file, which then is for good."""
        self._origin = origin
        self._live = live
        self._fleet = fleet
        self._metrics = metrics
        self._asked = False
        self._woken = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._files = live.now.settings.files
        # Not what stands there by now: it may have changed since it was read.
        self._settled = Settled(origin.seen if origin else ())
        self._due = float("inf")
        """When a file that an engine stood against is tried again."""
        self.report = SettingsReport(origin.sha256 if origin else "", "")
        self._hold(self.report.sha256)

    def ask(self) -> None:
        """Read the file now. From any thread, and from a signal's handler."""
        self._asked = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    async def watch(self) -> None:
        """Take what the file says as it changes, or as somebody asks, forever."""
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                if await self._is_due():
                    await self.attempt()
            except Exception:  # noqa: BLE001 - what holds, holds on
                LOGGER.exception("fault", extra={"fields": {"at": "settings"}})
                self._refuse("a fault in the server; its log has the place")
                await asyncio.sleep(_AGAIN_S)

    async def attempt(self) -> None:
        """Take what the file says, or tell why not."""
        self._due = float("inf")
        try:
            force, sha256 = await asyncio.to_thread(self._build)
            self._check_engines(_new(force, self._live.now))
        except InputError as error:
            self._refuse(str(error))
        except EngineError as error:
            self._refuse(str(error))
            self._due = monotonic() + _AGAIN_S
        else:
            level = force.settings.log.level
            if level != self._live.now.settings.log.level:
                set_level(level)
            self._live.now = force
            log(logging.INFO, "settings taken", sha256=sha256)
            self._hold(sha256)

    async def _is_due(self) -> bool:
        """Waits until the file is to be read, or may be."""
        every_s = self._live.now.settings.reload.every_s if self._origin else 0
        if not self._asked:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), every_s or None)
        self._woken.clear()
        if self._asked:
            self._asked = False
            return True
        return self._settled.see(await asyncio.to_thread(self._look)) or monotonic() >= self._due

    def _look(self) -> tuple[str, ...]:
        return look((self._origin.path, *self._files)) if self._origin else ()

    def _build(self) -> tuple[InForce, str]:
        """Everything that the file asks for, ready to hold. Raises ConfigError."""
        if self._origin is None:
            raise ConfigError("the settings came from no file that can be read again")
        path = self._origin.path
        settings, sha256 = self._origin.read()
        self._files = settings.files
        before = (sha256, *look(self._files))
        self._settled.read(before)
        if lines := moved(self._live.now.settings, settings):
            raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
        force = self._live.now.changed(settings)
        sleep(_STILL_S)
        if self._look() != before:
            raise ConfigError(f"{path}: changes while it is read; expected a file that stands still")
        return force, sha256

    def _check_engines(self, policies: Mapping[str, Policy]) -> None:
        """Whether every engine that speaks can judge by these. Raises EngineError."""
        known = {name: engine.keeper.status for name, engine in self._fleet.engines.items()}
        if policies and not any(known.values()):
            named = ", ".join(f"`{place}`" for place in policies)
            raise EngineError(f"no engine answers, so nobody says whether it can judge by {named}")
        for name, status in known.items():
            try:
                if status is not None:
                    check_policies(status, policies)
            except HandshakeError as error:
                raise EngineError(f"engine {name}: {error}") from None

    def _hold(self, sha256: str) -> None:
        now = datetime.now(UTC)
        self.report = SettingsReport(sha256, now.isoformat(timespec="seconds"))
        self._metrics.settings_hold(sha256, now.timestamp())

    def _refuse(self, reason: str) -> None:
        if reason != self.report.refused:
            log(logging.ERROR, "settings not taken; those before hold on", reason=reason)
        self.report = SettingsReport(self.report.sha256, self.report.since, reason)
        self._metrics.settings_refused()


def _new(wanted: InForce, held: InForce) -> dict[str, Policy]:
    """Policies that engines have not been held against yet."""
    asked = list(held.rulings.in_force().values())
    return {place: policy for place, policy in wanted.rulings.in_force().items() if policy not in asked}
