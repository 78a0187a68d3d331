"""Whether requests can be judged: engine up, guard loaded on every worker, a canary scored."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import monotonic
from uuid import uuid4

from guard.errors import EngineError, UndertowError
from server.assessment import Assessor, Usage
from server.errors import UpstreamError
from server.in_force import Live
from server.protocols.openai import TEXT, read_call
from server.ruling import Ruling
from server.telemetry.stopwatch import Stopwatch
from server.upstreams.handshake import Handshake, HandshakeKeeper
from server.upstreams.upstream import Upstream

_CACHE_S = 3.0
_CANARY_TIMEOUT_S = 10.0


class CanaryError(UndertowError):
    """A request made only to be scored was not."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A request that was made only to be scored."""

    at: str
    """When, in UTC, as ISO 8601."""
    seconds: float
    """How long it took."""
    generation: int
    """Of the guard that the handshake named."""
    reason: str | None
    """Why it was not scored; None where it was."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is ready. Reasons are sentences for an operator, by the check that failed."""

    checks: dict[str, str | None]
    canary: Canary | None = None
    """The last one that was sent; None where none was yet."""

    @property
    def ready(self) -> bool:
        return not any(self.checks.values())

    def body(self) -> bytes:
        """JSON: `{"ready": bool, "checks": {name: "ok"}, "reasons": {name: reason}, "canary": {...} | null}`."""
        checks = {name: "failed" if reason else "ok" for name, reason in self.checks.items()}
        reasons = {name: reason for name, reason in self.checks.items() if reason}
        canary = asdict(self.canary) if self.canary else None
        return json.dumps({"ready": self.ready, "checks": checks, "reasons": reasons, "canary": canary}).encode()


class Readiness:
    """Checks in order, and remembers the answer for a few seconds so that probes stay cheap."""

    def __init__(self, upstream: Upstream, keeper: HandshakeKeeper, live: Live) -> None:
        self._upstream = upstream
        self._keeper = keeper
        self._live = live
        self._lock = asyncio.Lock()
        self._report = Report({})
        self._last: Canary | None = None
        self._until = float("-inf")

    async def check(self) -> Report:
        """The report, at most a few seconds old."""
        async with self._lock:
            if monotonic() >= self._until:
                self._report = await self._check()
                self._until = monotonic() + _CACHE_S
            return self._report

    async def _check(self) -> Report:
        checks: dict[str, str | None] = {"upstream": None, "guard": None, "canary": None}
        unknown = "not tried"
        try:
            handshake = await self._keeper.refresh()
        except UpstreamError as error:
            return Report({"upstream": error.detail, "guard": unknown, "canary": unknown}, self._last)
        except EngineError as error:
            return Report({**checks, "guard": str(error), "canary": unknown}, self._last)
        at, began = datetime.now(UTC).isoformat(timespec="milliseconds"), monotonic()
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                await self._canary(handshake)
        except TimeoutError:
            checks["canary"] = f"no answer within {_CANARY_TIMEOUT_S:g} s"
        except (CanaryError, UpstreamError) as error:
            checks["canary"] = str(error)
        self._last = Canary(at, round(monotonic() - began, 4), handshake.generation, checks["canary"])
        return Report(checks, self._last)

    async def _canary(self, handshake: Handshake) -> None:
        """One real token through the engine, with complete evidence. Raises CanaryError or UpstreamError."""
        fields: dict[str, object] = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
        if handshake.fingerprint is None:
            # Only adapters have banks: the model itself cannot be scored.
            fields["model"] = min(handshake.adapters)
        call = read_call(TEXT, json.dumps(fields).encode())
        # The canary is judged as requests are, but must come through: it stands for the guard, not for its text.
        policy = self._live.now.rulings.default.policy
        policy = policy if policy.mode == "off" else policy.model_copy(update={"mode": "monitor"})
        body = call.upstream_body(policy, handshake.reserved_token_id)
        async with self._upstream.post(TEXT.path, body, None, f"canary-{uuid4().hex}", Stopwatch()) as answer:
            content = await answer.read()
        if answer.status in (401, 403):
            raise CanaryError(f"the engine answered {answer.status}; `upstream.api_key_env` must name its key")
        if answer.status != 200:
            raise CanaryError(f"the engine answered {answer.status}")
        try:
            usage = Usage.read(json.loads(content).get("usage"))
        except (ValueError, AttributeError):
            usage = None
        await self._keeper.catch_up(answer.evidence)
        failure = Assessor(call, Ruling(policy), handshake, self._keeper.knows).final(answer.evidence, usage)
        if failure is not None:
            raise CanaryError(f"{failure.kind}: {failure.detail}")
