"""One request that is made only to be scored."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from uuid import uuid4

from guard.errors import UndertowError
from guard.policy import Policy
from server.assessment import Assessor, Usage
from server.errors import UpstreamError
from server.protocols.openai import TEXT, read_call
from server.ruling import Ruling
from server.telemetry.stopwatch import Stopwatch
from server.upstreams.handshake import Handshake, HandshakeKeeper
from server.upstreams.upstream import Upstream

_TIMEOUT_S = 10.0


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


async def send_canary(upstream: Upstream, keeper: HandshakeKeeper, policy: Policy, handshake: Handshake) -> Canary:
    """One real token through the engine, with complete evidence."""
    at, began = datetime.now(UTC).isoformat(timespec="milliseconds"), monotonic()
    reason: str | None = None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await _send(upstream, keeper, policy, handshake)
    except TimeoutError:
        reason = f"no answer within {_TIMEOUT_S:g} s"
    except (CanaryError, UpstreamError) as error:
        reason = str(error)
    return Canary(at, round(monotonic() - began, 3), handshake.generation, reason)


async def _send(upstream: Upstream, keeper: HandshakeKeeper, policy: Policy, handshake: Handshake) -> None:
    # It is judged as requests are, but must come through: it stands for the guard, not for its text.
    policy = policy if policy.mode == "off" else policy.model_copy(update={"mode": "monitor"})
    fields: dict[str, object] = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    if handshake.fingerprint is None:
        # Only adapters have banks: the model itself cannot be scored.
        fields["model"] = min(handshake.adapters)
    call = read_call(TEXT, json.dumps(fields).encode())
    body = call.upstream_body(policy, handshake.reserved_token_id)
    async with upstream.post(TEXT.path, body, None, f"canary-{uuid4().hex}", Stopwatch()) as answer:
        content = await answer.read()
    if answer.status in (401, 403):
        raise CanaryError(f"the engine answered {answer.status}; `upstream.api_key_env` must name its key")
    if answer.status != 200:
        raise CanaryError(f"the engine answered {answer.status}")
    try:
        usage = Usage.read(json.loads(content).get("usage"))
    except (ValueError, AttributeError):
        usage = None
    await keeper.catch_up(answer.evidence)
    failure = Assessor(call, Ruling(policy), handshake, keeper.knows).final(answer.evidence, usage)
    if failure is not None:
        raise CanaryError(f"{failure.kind}: {failure.detail}")
