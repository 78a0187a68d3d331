"""Everything that keeps incidents, wired from the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.config.settings import Settings
from server.incidents.database import Database
from server.incidents.recorder import Recorder
from server.incidents.spool import Spool
from server.incidents.store import Store
from server.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Keeping:
    """The parts, where there are any."""

    database: Database | None
    store: Store | None
    recorder: Recorder | None

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str], metrics: Metrics) -> Keeping:
        """Open the database and the spool. Raises ConfigError."""
        wanted = settings.incidents
        database = Database.of(wanted, environ)
        if database is None:
            return cls(None, None, None)
        database.prepare()
        spool = None if wanted.spool is None else Spool(wanted.spool, wanted.spool_bytes)
        store = Store(database)
        return cls(database, store, Recorder(store, spool, wanted, metrics))

    def start(self) -> None:
        """Begin to write."""
        if self.recorder is not None:
            self.recorder.start()

    def close(self) -> None:
        """Write what is left, end what is open."""
        if self.recorder is not None:
            self.recorder.close()
        if self.database is not None:
            self.database.close()
