"""How much each key takes of this server, and what it may not. No I/O but the clock.

    with limiter.admit(client) as slot:          # ApiError 429
        slot.streams()                           # ApiError 429
        slot.spend(tokens)

Counts are of this process: several replicas each allow as much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from server.access.buckets import Bucket
from server.config.access import Quota
from server.errors import RateLimited

_BUSY_WAIT_S = 1.0
"""Nobody knows when a request of the same key will end."""


_UNLIMITED = Quota()


@dataclass(frozen=True, slots=True)
class Client:
    """Whoever asks, as far as a key says."""

    key: str | None = None
    """The id of it; None where no keys are kept."""
    tenant: str | None = None
    quota: Quota = _UNLIMITED


class _Use:
    """What one key takes."""

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.running = 0
        self.streaming = 0

    def fit(self, quota: Quota, now: float) -> None:
        """The settings may have changed since the last request."""
        self.requests = _fitted(self.requests, quota.requests_per_minute, now)
        self.tokens = _fitted(self.tokens, quota.tokens_per_minute, now)


class Limiter:
    """Of every key that has asked since the process began: as many as the keys file ever named."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def admit(self, client: Client) -> Slot:
        """A place for one request; leave it as a context manager. Raises RateLimited."""
        if client.key is None:
            return Slot(client, _Use(), self._clock)
        use, now = self._uses.setdefault(client.key, _Use()), self._clock()
        use.fit(client.quota, now)
        slot = Slot(client, use, self._clock)
        slot.enter(now)
        return slot


class Slot:
    """One request of a key."""

    def __init__(self, client: Client, use: _Use, clock: Callable[[], float]) -> None:
        self.client = client
        self._use = use
        self._clock = clock
        self._entered = self._streams = False

    def enter(self, now: float) -> None:
        """Count the request. Raises RateLimited, and then counts nothing."""
        use, quota = self._use, self.client.quota
        if quota.concurrent_requests is not None and use.running >= quota.concurrent_requests:
            raise RateLimited("concurrent_requests", quota.concurrent_requests, _BUSY_WAIT_S, self.headers)
        # Less than a whole token is none: after a debt the bucket must be above zero.
        if use.tokens is not None and (wait := use.tokens.wait(1, now)):
            raise RateLimited("tokens_per_minute", use.tokens.per_minute, wait, self.headers)
        if use.requests is not None:
            if wait := use.requests.wait(1, now):
                raise RateLimited("requests_per_minute", use.requests.per_minute, wait, self.headers)
            use.requests.take(1, now)
        use.running += 1
        self._entered = True

    def streams(self) -> None:
        """The request is for a stream. Raises RateLimited."""
        allowed = self.client.quota.concurrent_streams
        if allowed is not None and self._use.streaming >= allowed:
            raise RateLimited("concurrent_streams", allowed, _BUSY_WAIT_S, self.headers)
        self._use.streaming += 1
        self._streams = True

    def spend(self, tokens: int) -> None:
        """Charge the tokens of an answer."""
        if self._use.tokens is not None:
            self._use.tokens.take(tokens, self._clock())

    @property
    def headers(self) -> dict[str, str]:
        """What OpenAI's clients read of their limits."""
        now, told = self._clock(), {}
        for name, bucket in (("requests", self._use.requests), ("tokens", self._use.tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                told[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.per_minute, now):.3f}s"
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._use.running -= self._entered
        self._use.streaming -= self._streams
        self._entered = self._streams = False


def _fitted(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    if bucket.per_minute != per_minute:
        bucket.resize(per_minute, now)
    return bucket
