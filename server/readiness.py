"""Whether requests can be judged: an engine up, its guard loaded on every worker, a canary scored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from server.drain import Drain
from server.reload import SettingsReport
from server.upstreams.engine import EngineReport
from server.upstreams.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Report:
    """What is ready, by engine."""

    engines: Mapping[str, EngineReport]
    ending: bool = False
    """The server was told to end."""
    settings: SettingsReport | None = None
    """Which hold, and whether the file was refused."""

    @property
    def ready(self) -> bool:
        return not self.ending and any(engine.ready for engine in self.engines.values())

    def body(self) -> bytes:
        """JSON: `{"ready": bool, "ending": bool, "engines": {name: {"ready", "checks": {name: "ok"},
        "reasons": {name: reason}, "canary": {...} | null}}, "settings": {"sha256", "since", "refused": str | null}}`.
        """
        engines = {name: _told(engine) for name, engine in self.engines.items()}
        settings = self.settings.told() if self.settings else None
        return json.dumps(
            {"ready": self.ready, "ending": self.ending, "engines": engines, "settings": settings}
        ).encode()


class Readiness:
    """One engine that is ready is enough; each is told. Settings that were not taken make nothing unready: those before
    hold on."""

    def __init__(self, fleet: Fleet, drain: Drain, settings: Callable[[], SettingsReport]) -> None:
        self._settings = settings
        self._fleet = fleet
        self._drain = drain

    async def check(self) -> Report:
        """The report, at most a few seconds old."""
        engines = list(self._fleet.engines.values())
        reports = await asyncio.gather(*(engine.check() for engine in engines))
        named = {engine.name: report for engine, report in zip(engines, reports, strict=True)}
        return Report(named, self._drain.begun, self._settings())


def _told(engine: EngineReport) -> dict[str, Any]:
    checks = {name: "failed" if reason else "ok" for name, reason in engine.checks.items()}
    reasons = {name: reason for name, reason in engine.checks.items() if reason}
    canary = asdict(engine.canary) if engine.canary else None
    return {"ready": engine.ready, "checks": checks, "reasons": reasons, "canary": canary}
