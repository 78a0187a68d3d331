"""Whether requests can be judged: an engine up, its guard loaded on every worker, a canary scored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from server.drain import Drain
from server.upstreams.engine import EngineReport
from server.upstreams.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Report:
    """What is ready, by engine."""

    engines: Mapping[str, EngineReport]
    ending: bool = False
    """The server was told to end."""

    @property
    def ready(self) -> bool:
        return not self.ending and any(engine.ready for engine in self.engines.values())

    def body(self) -> bytes:
        """JSON: `{"ready": bool, "ending": bool, "engines": {name: {"ready", "checks": {name: "ok"},
        "reasons": {name: reason}, "canary": {...} | null}}}`."""
        engines = {name: _told(engine) for name, engine in self.engines.items()}
        return json.dumps({"ready": self.ready, "ending": self.ending, "engines": engines}).encode()


class Readiness:
    """One engine that is ready is enough; each is told."""

    def __init__(self, fleet: Fleet, drain: Drain) -> None:
        self._fleet = fleet
        self._drain = drain

    async def check(self) -> Report:
        """The report, at most a few seconds old."""
        engines = list(self._fleet.engines.values())
        reports = await asyncio.gather(*(engine.check() for engine in engines))
        named = {engine.name: report for engine, report in zip(engines, reports, strict=True)}
        return Report(named, self._drain.begun)


def _told(engine: EngineReport) -> dict[str, Any]:
    checks = {name: "failed" if reason else "ok" for name, reason in engine.checks.items()}
    reasons = {name: reason for name, reason in engine.checks.items() if reason}
    canary = asdict(engine.canary) if engine.canary else None
    return {"ready": engine.ready, "checks": checks, "reasons": reasons, "canary": canary}
