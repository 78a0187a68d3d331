"""Incidents on their way: whatever happens to database or disk, requests do not wait and nothing is counted twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from guard.errors import ConfigError
from server.config.incidents import IncidentSettings
from server.incidents.database import Database
from server.incidents.recorder import Recorder
from server.incidents.spool import Spool
from server.incidents.store import Filter, Store
from server.telemetry.metrics import Metrics
from tests.server.conftest import samples

from .conftest import incident

LARGE = 2**26


def eventually(true: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics.expose().decode()).get((name, frozenset(labels.items())), 0.0)


@contextmanager
def recording(store: Store, spool: Spool | None, **settings: Any) -> Iterator[tuple[Recorder, Metrics]]:
    metrics = Metrics("test")
    recorder = Recorder(store, spool, IncidentSettings(**settings), metrics, retry_s=0.05)
    recorder.start()
    try:
        yield recorder, metrics
    finally:
        recorder.close()


def break_(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE incidents RENAME TO away"))


def mend(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO incidents"))


def test_what_is_recorded_is_stored_and_counted(store: Store, tmp_path: Path) -> None:
    with recording(store, Spool(tmp_path / "spool", LARGE)) as (recorder, metrics):
        for number in range(700):
            recorder.record(incident(number))
        assert eventually(lambda: len(list(store.all(Filter()))) == 700)
        assert value(metrics, "undertow_incidents_total", action="block") == 700
        assert eventually(lambda: value(metrics, "undertow_incident_database_up") == 1)
        recorder.tidy()
        assert eventually(lambda: value(metrics, "undertow_reviewed_incidents", label="none") == 700)


def test_while_the_database_is_gone_incidents_are_spooled_and_then_stored_once(
    database: Database, store: Store, tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "spool", LARGE)
    with recording(store, spool) as (recorder, metrics):
        recorder.record(incident(0))
        assert eventually(lambda: len(list(store.all(Filter()))) == 1)
        break_(database)
        kept = [incident(number) for number in range(1, 30)]
        for each in kept:
            recorder.record(each)
        assert eventually(lambda: (tmp_path / "spool").read_bytes().count(b"\n") == 29)
        assert value(metrics, "undertow_incident_database_up") == 0
        assert value(metrics, "undertow_incident_spool_bytes") > 0
        mend(database)
        assert eventually(lambda: len(list(store.all(Filter()))) == 30)
        assert eventually(lambda: spool.size == 0)
        assert eventually(lambda: value(metrics, "undertow_incident_spool_bytes") == 0)
        assert value(metrics, "undertow_incidents_dropped_total") == 0


def test_what_is_left_at_the_end_is_spooled_and_stored_by_the_next_start(
    database: Database, store: Store, tmp_path: Path
) -> None:
    break_(database)
    with recording(store, Spool(tmp_path / "spool", LARGE)) as (recorder, _):
        recorder.record(incident(1))
        recorder.record(incident(2))
    mend(database)
    assert list(store.all(Filter())) == []
    with recording(store, Spool(tmp_path / "spool", LARGE)):
        assert eventually(lambda: len(list(store.all(Filter()))) == 2)


def test_a_process_that_is_killed_loses_nothing_that_was_spooled(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from server.incidents.spool import Spool\n"
        "from tests.incidents.conftest import incident\n"
        "spool = Spool(Path(sys.argv[1]), 2**26)\n"
        "spool.append([incident(number) for number in range(3)])\n"
        "print('spooled', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "spool")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"spooled\n"
    with pytest.raises(ConfigError, match="another server has"):
        Spool(tmp_path / "spool", LARGE)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with (tmp_path / "spool").open("ab") as file:
        file.write(b'{"id": "half a li')
    found = Spool(tmp_path / "spool", LARGE)
    assert [each.request_id for chunk in found.read() for each in chunk] == ["request-0", "request-1", "request-2"]
    found.append([incident(3)])
    assert sum(len(chunk) for chunk in found.read(chunk=2)) == 4
    found.close()


def test_a_full_spool_drops_the_newest_and_says_so(
    database: Database, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_(database)
    line = len(incident(0).model_dump_json()) + 1
    spool = Spool(tmp_path / "spool", 3 * line + 10)
    with recording(store, spool) as (recorder, metrics):
        for number in range(5):
            recorder.record(incident(number))
        assert eventually(lambda: value(metrics, "undertow_incidents_dropped_total") == 2)
        assert [each.request_id for chunk in spool.read() for each in chunk] == [
            f"request-{number}" for number in range(3)
        ]
        assert any(record.levelname == "CRITICAL" for record in caplog.records)
        mend(database)
        assert eventually(lambda: len(list(store.all(Filter()))) == 3)


def test_with_a_full_disk_and_no_database_incidents_wait_in_memory(database: Database, store: Store) -> None:
    break_(database)
    with recording(store, Spool(Path("/dev/full"), LARGE)) as (recorder, metrics):
        for number in range(5):
            recorder.record(incident(number))
        time.sleep(0.3)
        assert value(metrics, "undertow_incidents_dropped_total") == 0
        mend(database)
        assert eventually(lambda: len(list(store.all(Filter()))) == 5)
        assert value(metrics, "undertow_incidents_dropped_total") == 0


def test_memory_is_bounded_and_what_it_cannot_take_is_counted(database: Database, store: Store) -> None:
    break_(database)
    with recording(store, None) as (recorder, metrics):
        began = time.perf_counter()
        one = incident(0)
        for _ in range(12_000):
            recorder.record(one)
        assert time.perf_counter() - began < 5, "whoever reports does not wait"
        assert eventually(lambda: 1_000 < value(metrics, "undertow_incidents_dropped_total") < 3_000)
    assert value(metrics, "undertow_incidents_dropped_total") == 12_000, "and at the end all that were not stored"


def test_retention_is_kept_while_the_server_runs(store: Store) -> None:
    store.add([incident(number) for number in range(1500)])
    with recording(store, None, retention_days=None, max_rows=100):
        assert eventually(lambda: len(list(store.all(Filter()))) == 100)


def test_a_spool_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`incidents\.spool`: .*no/spool cannot be written: No such file"):
        Spool(tmp_path / "no" / "spool", LARGE)
