"""Databases, real ones, and incidents to put into them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from server.config.incidents import IncidentSettings
from server.incidents.database import Database
from server.incidents.incident import Incident
from server.incidents.store import Store
from tests.server.conftest import engine, played  # noqa: F401

from .postgres import running

BEGAN = datetime(2026, 11, 23, 6, 0, tzinfo=UTC)


def incident(number: int = 0, **changes: Any) -> Incident:
    """One, `number` seconds after the first."""
    fields: dict[str, Any] = {
        "id": uuid4().hex,
        "at": BEGAN + timedelta(seconds=number),
        "request_id": f"request-{number}",
        "endpoint": "chat_completions",
        "model": "tuned",
        "engine": "main",
        "tenant": None,
        "key": None,
        "policy": "default",
        "mode": "enforce",
        "action": "block",
        "reason": "density in the prompt, p = 0.0004",
        "phase": "prompt",
        "detector": "density",
        "score": 12.5,
        "threshold": 4.0,
        "p_value": 0.0004,
        "position": 17,
        "layer": 5,
        "direction": "layers.5.mlp.down_proj:3",
        "stream": False,
        "bank": "sha256:bank",
        "calibration": "sha256:calibration",
        "content_kind": "off",
        "content": None,
        "sequences": (),
    }
    return Incident.model_validate(fields | changes)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A fresh one of each kind."""
    if request.param == "sqlite":
        made = Database.of(IncidentSettings(path=tmp_path / "incidents.db"), {})
        assert made is not None
        made.prepare()
    else:
        url = request.getfixturevalue("postgres_url")
        made = Database.of(IncidentSettings(path=None, url_env="DATABASE_URL"), {"DATABASE_URL": url})
        assert made is not None
        with made.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        made.migrate()
    yield made
    made.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)
