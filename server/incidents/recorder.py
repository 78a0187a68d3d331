"""Incidents on their way to the database. Requests only put them into a queue; one thread does the rest.

recorder.record(incident)      at once, from the event loop
recorder.close()               what is queued is stored or spooled

What the database does not take is spooled, and what the spool does not take stays in memory, as much as there is room
for; only then is anything dropped, and counted. Where the process is killed, what was queued in its last moments and is
neither stored nor spooled is lost: the log has a line for it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from sqlalchemy.exc import SQLAlchemyError

from server.config.incidents import IncidentSettings
from server.incidents.incident import LABELS, Incident
from server.incidents.spool import Spool
from server.incidents.store import Store
from server.telemetry.logs import log
from server.telemetry.metrics import Metrics

_MOST_QUEUED = 10_000
_BATCH = 500
_RETRY_S = 2.0
_HOUSEKEEPING_S = 60.0
_SAID_EVERY_S = 1.0


class Recorder:
    """Owns the spool and one thread. Everything public may be called from any thread."""

    def __init__(
        self,
        store: Store,
        spool: Spool | None,
        settings: IncidentSettings,
        metrics: Metrics,
        *,
        retry_s: float = _RETRY_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._store = store
        self._spool = spool
        self._settings = settings
        self._metrics = metrics
        self._retry_s = retry_s
        self._clock = clock
        self._queue: deque[Incident] = deque()
        self._wake = threading.Condition()
        self._ending = False
        self._down_until: float | None = None
        """Of the database; None where it took the last thing that it was given."""
        self._next_housekeeping = 0.0
        self._unsaid = 0
        """Dropped, and not in the log yet."""
        self._quiet_until = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write."""
        self._thread = threading.Thread(target=self._run, name="incidents", daemon=True)
        self._thread.start()

    def record(self, incident: Incident) -> None:
        """Take one; never waits."""
        with self._wake:
            if len(self._queue) >= _MOST_QUEUED:
                self._dropped(1, "the queue is full")
                return
            self._queue.append(incident)
            self._metrics.incident(incident.action)
            self._wake.notify()

    def tidy(self) -> None:
        """Count labels anew soon: somebody has changed one."""
        with self._wake:
            self._next_housekeeping = 0.0
            self._wake.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Store or spool what is left, and end."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._spool is not None and (self._thread is None or not self._thread.is_alive()):
            self._spool.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._ending or self._due(), timeout=self._retry_s)
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH))]
                ending = self._ending
            if batch:
                self._keep(batch)
            elif ending:
                return
            if not ending:
                self._replay()
                self._housekeeping()

    def _due(self) -> bool:
        return self._clock() >= self._next_housekeeping

    def _keep(self, batch: list[Incident]) -> None:
        if self._up():
            try:
                self._store.add(batch)
            except SQLAlchemyError as error:
                self._failed(error)
            else:
                self._worked()
                return
        self._put_aside(batch)

    def _put_aside(self, batch: list[Incident]) -> None:
        taken = 0
        if self._spool is not None:
            try:
                taken = self._spool.append(batch)
                if taken < len(batch):
                    self._dropped(len(batch) - taken, "the spool is full")
                    return
            except OSError as error:
                log(logging.ERROR, "spool of incidents cannot be written", reason=error.strerror)
            finally:
                self._metrics.spooled(self._spool.size)
            if taken:
                return
        with self._wake:
            ending = self._ending
            back = [] if ending else batch[: _MOST_QUEUED - len(self._queue)]
            self._queue.extendleft(reversed(back))
        if len(back) < len(batch):
            self._dropped(len(batch) - len(back), "neither database nor spool can be written")
        if ending:
            return
        # Not again and again as fast as this thread can.
        threading.Event().wait(min(self._retry_s, 0.5))

    def _replay(self) -> None:
        """Give the database what was spooled."""
        if self._spool is None or self._spool.size == 0 or not self._up():
            return
        try:
            found = sum(self._store.add(chunk) for chunk in self._spool.read())
            self._spool.clear()
        except SQLAlchemyError as error:
            self._failed(error)
            return
        except OSError as error:
            log(logging.ERROR, "spool of incidents cannot be emptied", reason=error.strerror)
            return
        self._metrics.spooled(0)
        self._worked()
        log(logging.WARNING, "spooled incidents are in the database", count=found)

    def _housekeeping(self) -> None:
        if not self._due() or not self._up():
            return
        try:
            deleted = self._store.prune(self._settings.retention_days, self._settings.max_rows)
            found = self._store.labels()
        except SQLAlchemyError as error:
            self._failed(error)
            return
        self._worked()
        for label in (*LABELS, "none"):
            self._metrics.labelled(label, found.get(label, 0))
        # A thousand at a time, so that the next incident does not wait long.
        self._next_housekeeping = self._clock() + (0.0 if deleted else _HOUSEKEEPING_S)

    def _up(self) -> bool:
        return self._down_until is None or self._clock() >= self._down_until

    def _failed(self, error: SQLAlchemyError) -> None:
        if self._down_until is None:
            # Its class, not its text: that may hold the statement.
            kind = type(getattr(error, "orig", None) or error).__name__
            log(logging.ERROR, "database of incidents does not answer; incidents are spooled", kind=kind)
        self._metrics.database(up=False)
        self._down_until = self._clock() + self._retry_s

    def _worked(self) -> None:
        if self._down_until is not None:
            log(logging.WARNING, "database of incidents answers again")
        self._metrics.database(up=True)
        self._down_until = None

    def _dropped(self, count: int, reason: str) -> None:
        self._metrics.incidents_dropped(count)
        self._unsaid += count
        now = self._clock()
        if now >= self._quiet_until:
            log(logging.CRITICAL, "incidents were dropped", count=self._unsaid, reason=reason)
            self._unsaid, self._quiet_until = 0, now + _SAID_EVERY_S
