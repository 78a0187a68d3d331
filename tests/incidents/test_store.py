"""Incidents in SQLite and in PostgreSQL: the same facts for both."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from guard.errors import ConfigError, InputError
from server.config.incidents import IncidentSettings
from server.incidents.database import Database, head
from server.incidents.store import Filter, Store
from server.incidents.tables import METADATA

from .conftest import BEGAN, incident
from .postgres import PASSWORD


def test_what_is_put_in_comes_out(store: Store) -> None:
    scores = {
        "detector": "density", "phase": "prompt", "score": 12.5, "threshold": 4.0, "p_value": 0.0004, "position": 17,
        "first": 16, "layer": 5, "direction": None,
    }  # fmt: skip
    sequence = {
        "prompt_index": 0, "choice_index": 1, "prompt_tokens": 18, "tokens_scored": 18, "action": "block",
        "reason": "x", "phase": "prompt", "detector": "density", "steered_from": None, "scores": [scores],
    }  # fmt: skip
    one = incident(sequences=[sequence], content_kind="full", content='{"prompt": "\u2028 ünï"}', tenant="lab")
    assert store.add([one]) == 1
    found = store.get(one.id)
    assert found is not None
    assert found.incident == one
    assert (found.label, found.labelled_at) == (None, None)
    assert store.get("0" * 32) is None


def test_an_incident_is_kept_once_however_often_it_comes(store: Store) -> None:
    one, other = incident(1), incident(2)
    assert store.add([one]) == 1
    assert store.add([one, other, one]) == 1
    assert store.add([]) == 0
    assert len(list(store.all(Filter()))) == 2


def test_pages_are_newest_first_and_lose_nothing_of_the_same_time(store: Store) -> None:
    kept = [incident(number // 3) for number in range(20)]
    store.add(kept)
    seen: list[str] = []
    after = None
    while True:
        page = store.page(Filter(), 7, after)
        seen += [each.incident.id for each in page.incidents]
        if page.after is None:
            break
        after = page.after
        store.add([incident(100)])  # what comes meanwhile disturbs no later page
    expected = sorted(kept, key=lambda each: (each.at, each.id), reverse=True)
    assert seen == [each.id for each in expected]
    with pytest.raises(InputError, match="not a place"):
        store.page(Filter(), 7, "nonsense")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"tenant": "lab"},
        {"key": "3f0c2a91d7be"},
        {"policy": "strict"},
        {"action": "flag"},
        {"mode": "monitor"},
        {"phase": "completion"},
        {"detector": "intrinsic"},
        {"layer": 6},
        {"direction": "layers.6.o_proj:0"},
        {"endpoint": "completions"},
        {"request_id": "mine"},
    ],
)
def test_every_filter_finds_what_it_names_and_nothing_else(store: Store, change: dict[str, object]) -> None:
    wanted, other = incident(1, **change), incident(2)
    store.add([wanted, other])
    assert [each.incident.id for each in store.all(Filter(**change))] == [wanted.id]  # type: ignore[arg-type]


def test_times_are_filtered_whatever_zone_they_are_said_in(store: Store) -> None:
    store.add([incident(number) for number in range(4)])
    from zoneinfo import ZoneInfo

    said = (BEGAN + timedelta(seconds=2)).astimezone(ZoneInfo("Asia/Tokyo"))
    assert len(list(store.all(Filter(since=said)))) == 2
    assert len(list(store.all(Filter(until=said)))) == 2


def test_the_last_label_holds_and_every_one_is_remembered(store: Store) -> None:
    one, other = incident(1), incident(2)
    store.add([one, other])
    assert store.label("0" * 32, "true", "ada", "") is None
    store.label(one.id, "true", "ada", "looks like it")
    found = store.label(one.id, "false", "bob", "")
    assert found is not None
    assert (found.label, found.labelled_by, found.note) == ("false", "bob", "")
    assert [(each["label"], each["by"], each["note"]) for each in store.history(one.id)] == [
        ("true", "ada", "looks like it"),
        ("false", "bob", ""),
    ]
    assert store.labels() == {"false": 1, "none": 1}
    assert [each.incident.id for each in store.all(Filter(label="none"))] == [other.id]
    assert [each.incident.id for each in store.all(Filter(label="false"))] == [one.id]
    store.add([one])
    assert store.labels() == {"false": 1, "none": 1}, "what comes again keeps its label"


def test_the_oldest_go_first_with_their_labels(store: Store) -> None:
    kept = [incident(number) for number in range(6)]
    store.add(kept)
    store.label(kept[0].id, "true", "ada", "")
    now = BEGAN + timedelta(days=30, seconds=2)
    assert store.prune(30, None, now) == 2
    assert store.get(kept[0].id) is None
    assert store.history(kept[0].id) == []
    assert store.prune(30, None, now) == 0
    assert store.prune(None, 3, now) == 1
    assert {each.incident.id for each in store.all(Filter())} == {each.id for each in kept[3:]}
    assert store.prune(None, None, now) == 0


def test_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
    assert database.revision() == head()
    database.migrate()
    database.prepare()


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "incidents.db"
    made = Database.of(IncidentSettings(path=path), {})
    assert made is not None
    made.prepare()
    Store(made).add([incident()])
    for each in tmp_path.iterdir():
        assert stat.S_IMODE(each.stat().st_mode) & 0o077 == 0, each
    made.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    made = Database.of(IncidentSettings(path=tmp_path / "no" / "incidents.db"), {})
    assert made is not None
    with pytest.raises(ConfigError, match=r"`incidents\.path`: .*no/incidents\.db cannot be used: No such file"):
        made.prepare()
    (tmp_path / "text.db").write_text("this is no database, but long enough to be looked at as if it were one" * 40)
    made = Database.of(IncidentSettings(path=tmp_path / "text.db"), {})
    assert made is not None
    with pytest.raises(ConfigError, match="file is not a database"):
        made.prepare()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "neither is"),
        ({"DB": f"postgresql://u:{PASSWORD}@h/n", "DB_FILE": "/x"}, "both are"),
        ({"DB": f"not a url {PASSWORD}"}, "is not a URL"),
        ({"DB": f"mysql://u:{PASSWORD}@h/n"}, "is not of a PostgreSQL database"),
        ({"DB": f"postgresql://u:{PASSWORD}@h"}, "is not of a PostgreSQL database"),
        ({"DB_FILE": "/nowhere/at/all"}, "cannot be read"),
    ],
)
def test_a_wrong_url_is_named_and_never_shown(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        Database.of(IncidentSettings(path=None, url_env="DB"), environ)
    assert PASSWORD not in str(raised.value)


def test_a_postgresql_that_was_not_migrated_is_told_how(postgres_url: str) -> None:
    from sqlalchemy import text

    made = Database.of(IncidentSettings(path=None, url_env="DB"), {"DB": postgres_url})
    assert made is not None
    with made.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    with pytest.raises(ConfigError, match=r"version none, expected .*; run `undertow incidents migrate") as raised:
        made.prepare()
    assert PASSWORD not in str(raised.value)
    made.close()


def test_a_postgresql_that_is_away_is_no_reason_not_to_start() -> None:
    made = Database.of(
        IncidentSettings(path=None, url_env="DB"), {"DB": f"postgresql://u:{PASSWORD}@127.0.0.1:9/nothing"}
    )
    assert made is not None
    made.prepare()
    assert PASSWORD not in made.name + repr(made.url)
