"""From a request's credentials to who asks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from server.access.keys import KeyRefused, Keys, read_keys
from server.access.limiter import Client
from server.config.access import AccessSettings
from server.errors import unauthorized


def _now() -> datetime:
    return datetime.now(UTC)


class Door:
    """Knows every key. Immutable: other keys or quotas are another door."""

    def __init__(self, settings: AccessSettings, keys: Keys | None, clock: Callable[[], datetime] = _now) -> None:
        self._settings = settings
        self._keys = keys
        self._clock = clock

    @classmethod
    def of(cls, settings: AccessSettings) -> Door:
        """Reads the keys file. Raises ConfigError."""
        return cls(settings, None if settings.keys_file is None else Keys(read_keys(settings.keys_file)))

    @property
    def locked(self) -> bool:
        """Whether clients need a key of ours. Then what they send as one is not for the engine."""
        return self._keys is not None

    @property
    def tenants(self) -> frozenset[str]:
        """That have a key."""
        return self._keys.tenants if self._keys else frozenset()

    def admit(self, authorization: str | None) -> Client:
        """Who asks, from what stands in `Authorization`. Raises ApiError 401."""
        if self._keys is None:
            return Client()
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise unauthorized("You didn't provide an API key: expected `Authorization: Bearer KEY`.")
        try:
            record = self._keys.holder(key.strip(), self._clock())
        except KeyRefused as refused:
            raise unauthorized(str(refused)) from None
        return Client(record.id, record.tenant, self._settings.quota(record.tenant))
