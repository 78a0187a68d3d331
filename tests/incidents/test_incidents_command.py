"""`undertow incidents`, and the settings that say where incidents are: what is not there is named, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import cli
from server.config.incidents import IncidentSettings
from server.incidents.database import Database
from server.incidents.store import Store

from .conftest import incident


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings beside a database with three incidents."""
    path = tmp_path / "undertow.yaml"
    path.write_text(f"version: 1\nincidents: {{path: {tmp_path / 'i.db'}, spool: {tmp_path / 's'}}}\n")
    database = Database.of(IncidentSettings(path=tmp_path / "i.db"), {})
    assert database is not None
    database.prepare()
    Store(database).add([incident(0), incident(1), incident(2)])
    database.close()
    return path


def test_more_than_the_limit_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["incidents", "list", "--config", str(config), "--limit", "2", "--days", "100000"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("block") == 2
    assert "there are more than 2: --limit" in printed.err
    assert cli.main(["incidents", "list", "--config", str(config), "--days", "0.0001"]) == 0


@pytest.mark.parametrize("words", [["show", "none"], ["label", "none", "true", "--by", "ada"]])
def test_an_incident_that_is_not_there_is_named(
    config: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["incidents", *words, "--config", str(config)]) == 2
    assert "there is no incident 'none'" in capsys.readouterr().err


def test_a_database_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "undertow.yaml"
    path.write_text(f"version: 1\nincidents: {{path: {tmp_path / 'i.db'}}}\n")
    assert cli.main(["incidents", "list", "--config", str(path)]) == 2
    assert "is not there; the server makes it when it starts" in capsys.readouterr().err
    path.write_text("version: 1\nincidents: {path: null}\n")
    assert cli.main(["incidents", "list", "--config", str(path)]) == 2
    assert "names no database" in capsys.readouterr().err


def test_two_places_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "undertow.yaml"
    path.write_text("version: 1\nincidents: {path: i.db, url_env: URL}\n")
    assert cli.main(["config", "validate", str(path)]) == 2
    assert "expected one of `path` and `url_env`" in capsys.readouterr().err


def test_a_variable_for_a_section_that_is_none_leaves_the_file_to_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from server.config.settings import ENVIRONMENT

    variable, (section, *_) = next((name, place) for name, place in ENVIRONMENT.items() if len(place) > 1)
    path = tmp_path / "undertow.yaml"
    path.write_text(f"version: 1\n{section}: 3\n")
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert cli.main(["config", "validate", str(path)]) == 2
    assert section in capsys.readouterr().err
