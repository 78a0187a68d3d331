"""How long a request spends here, without the time it waits for the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


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

    def wait(self) -> None:
        """Time from now on belongs to the engine, until `go_on`."""
        self._wait_begun = perf_counter()

    def go_on(self) -> None:
        """The engine did what it was waited for."""
        if self._wait_begun is not None:
            self._waited += perf_counter() - self._wait_begun
            self._wait_begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside belongs to the engine."""
        self.wait()
        try:
            yield
        finally:
            self.go_on()
