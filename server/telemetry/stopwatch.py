"""How long a request spends here, without the time it waits for the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

_WAITS = ("connection.connect_tcp", "connection.start_tls", "http11.receive_response_headers")
"""Steps of the HTTP client in which it waits. Its other steps are work of this process and count as added."""


class Stopwatch:
    """Starts when it is made. Seconds everywhere."""

    def __init__(self) -> None:
        self._begun = perf_counter()
        self._waited = 0.0
        self._wait_begun: float | None = None

    @property
    def total(self) -> float:
        """Since it was made."""
        return perf_counter() - self._begun

    @property
    def added(self) -> float:
        """Total without what was spent waiting."""
        return max(0.0, self.total - self._waited)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside belongs to the engine."""
        begun = perf_counter()
        try:
            yield
        finally:
            self._waited += perf_counter() - begun

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        """The HTTP client's trace hook."""
        step, _, moment = event.rpartition(".")
        if step not in _WAITS:
            return
        if moment == "started":
            self._wait_begun = perf_counter()
        elif self._wait_begun is not None:
            self._waited += perf_counter() - self._wait_begun
            self._wait_begun = None
