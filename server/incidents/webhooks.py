"""Incidents as messages over HTTP, signed. Requests only put them into a queue; one task sends.

    webhooks.offer(incident)       at once
    await webhooks.run()           forever

A message says what the log says and never what a client wrote. Its signature is the header `x-undertow-signature`:
`t=SECONDS,v1=HEX`, HEX being HMAC-SHA256 of `SECONDS.BODY` under the secret, so that an old one is no new one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

from guard.control import read_token
from guard.errors import ConfigError
from server.config.admin import is_loopback
from server.config.webhooks import Webhook
from server.config.webhooks import Webhooks as WebhookSettings
from server.incidents.incident import Incident
from server.telemetry.logs import log
from server.telemetry.metrics import Metrics

_MOST_QUEUED = 1000
_TIMEOUT_S = 10.0
_PAUSES_S = (1.0, 5.0, 25.0)
"""Between attempts."""
_UNSAID = {"content", "content_kind", "sequences", "key"}

Sleep = Callable[[float], Any]


@dataclass(frozen=True, slots=True)
class Target:
    """An address, and what messages to it are signed with."""

    webhook: Webhook
    secret: bytes


class ForbiddenAddressError(OSError):
    """A name that means an address which no message goes to."""


class _Resolver(AbstractResolver):
    """Names as the system knows them, but for addresses of this machine and of the link: there clouds keep secrets."""

    def __init__(self) -> None:
        self._inner = DefaultResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for each in found:
            if forbidden(host, each["host"]):
                raise ForbiddenAddressError(f"{host} is at an address of this machine or of its link")
        return found

    async def close(self) -> None:
        await self._inner.close()


def forbidden(host: str, address: str) -> bool:
    """Whether a message for `host` must not go to `address`."""
    there = ip_address(address.partition("%")[0])
    there = getattr(there, "ipv4_mapped", None) or there
    if there.is_loopback or there.is_unspecified:
        return not is_loopback(host)
    return there.is_link_local or there.is_multicast or there.is_reserved


class Webhooks:
    """All targets, and what waits for them."""

    def __init__(
        self,
        settings: WebhookSettings,
        environ: Mapping[str, str],
        metrics: Metrics,
        sleep: Sleep = asyncio.sleep,
        pauses_s: Sequence[float] = _PAUSES_S,
    ) -> None:
        """Raises ConfigError where a secret is not set."""
        self._targets = targets(settings, environ)
        self._metrics = metrics
        self._sleep = sleep
        self._pauses_s = pauses_s
        self._queue: asyncio.Queue[tuple[Target, bytes]] = asyncio.Queue(_MOST_QUEUED)

    @property
    def wanted(self) -> bool:
        """Somebody is to hear of incidents."""
        return bool(self._targets)

    def offer(self, incident: Incident) -> None:
        """Send it to whoever wants such ones; never waits."""
        body: bytes | None = None
        for target in self._targets:
            if incident.action not in target.webhook.actions:
                continue
            body = body or message(incident)
            try:
                self._queue.put_nowait((target, body))
            except asyncio.QueueFull:
                self._metrics.webhook("dropped")

    async def run(self) -> None:
        """Send what is offered, one at a time, forever."""
        if not self._targets:
            return
        connector = aiohttp.TCPConnector(resolver=_Resolver(), limit=4)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        # Neither proxies nor credentials of the environment: where a message goes is in the settings alone.
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            while True:
                target, body = await self._queue.get()
                await self._deliver(session, target, body)

    async def _deliver(self, session: aiohttp.ClientSession, target: Target, body: bytes) -> None:
        reason = ""
        for pause_s in (*self._pauses_s, None):
            reason = await self._attempt(session, target, body)
            if not reason:
                self._metrics.webhook("sent")
                return
            if pause_s is not None:
                await self._sleep(pause_s)
        self._metrics.webhook("failed")
        # Its path may be as good as a password.
        log(logging.ERROR, "webhook failed", host=target.webhook.host, reason=reason)

    async def _attempt(self, session: aiohttp.ClientSession, target: Target, body: bytes) -> str:
        """Why it failed; empty where it did not."""
        headers = {
            "content-type": "application/json",
            "x-undertow-signature": signature(target.secret, int(time.time()), body),
        }
        url = target.webhook.url
        if is_loopback(target.webhook.host) or not forbidden_literal(target.webhook.host):
            try:
                async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                    return "" if 200 <= answer.status < 300 else f"it answered {answer.status}"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return type(error).__name__
        return ForbiddenAddressError.__name__


def forbidden_literal(host: str) -> bool:
    """Whether `host` is itself an address that no message goes to: nobody resolves those."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return forbidden("", host)


def targets(settings: WebhookSettings, environ: Mapping[str, str]) -> list[Target]:
    """Everyone who is told. Raises ConfigError where a secret is not set."""
    return [Target(each, _secret(index, each, environ)) for index, each in enumerate(settings.send)]


def message(incident: Incident) -> bytes:
    """What is sent of one."""
    fields = incident.model_dump(mode="json", exclude=_UNSAID)
    text = f"{incident.action}: {incident.reason or 'not scored'} ({incident.model}, policy {incident.policy})"
    # `text` is what Slack, Mattermost and others show.
    return json.dumps({"text": text, "incident": fields}, separators=(",", ":")).encode()


def signature(secret: bytes, seconds: int, body: bytes) -> str:
    """Of a message that is sent at this time (Unix)."""
    return f"t={seconds},v1={hmac.new(secret, f'{seconds}.'.encode() + body, hashlib.sha256).hexdigest()}"


def _secret(index: int, webhook: Webhook, environ: Mapping[str, str]) -> bytes:
    secret = read_token(environ, webhook.secret_env)
    if secret is None:
        raise ConfigError(
            f"`webhooks.send.{index}.secret_env` names {webhook.secret_env}, which is not set; expected a key of at "
            "least 16 characters"
        )
    return secret
