"""How long a request spends here, without the time it waits for the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol


class Holding(Protocol):
    """What keeps back a part of a stream."""

    @property
    def holding(self) -> bool:
        """Something was kept back."""

    @property
    def let_go(self) -> bool:
        """Something of it was let go, or nothing ever will be."""


class HoldBackTimer:
    """How long the beginning of a stream is kept back; tells it once, as somebody looks."""

    def __init__(self, guard: Holding, told: Callable[[float], None]) -> None:
        self._guard = guard
        self._told = told
        self._begun: float | None = None
        self._done = False

    def look(self) -> None:
        """After every part of the stream."""
        if self._done:
            return
        if self._begun is None and self._guard.holding:
            self._begun = perf_counter()
        if self._begun is not None and self._guard.let_go:
            self._done = True
            self._told(perf_counter() - self._begun)


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
