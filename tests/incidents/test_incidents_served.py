"""From a request to an incident and its label, over sockets; and what happens while the database is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.errors import ConfigError
from guard.prompts import read_reviewed
from server import cli
from server.app import create_app
from server.config.settings import Settings
from tests.server.conftest import Proxy, settings_for
from tests.server.fake_engine import FINGERPRINT, FakeEngine, Script
from tests.server.hosting import Host, hosted
from tests.server.test_server_answers import BODIES, CHAT, MESSAGES, chat_body

from .test_recorder import eventually

KEY = {"UNDERTOW_HASH_KEY": "hash-key-canary-0123"}
TOKEN = "operators-token-0123456789"


@contextmanager
def served(url: str, folder: Path, environ: dict[str, str] | None = None, **changes: Any) -> Iterator[Proxy]:
    fields = settings_for(url).model_dump(exclude_unset=True)
    kept = {"path": folder / "incidents.db", "spool": folder / "spool"}
    settings = Settings.model_validate({**fields, "incidents": kept, **changes})
    with hosted(create_app(settings, environ or {}), "on") as host:
        yield Proxy(host)


@pytest.fixture
def proxy(engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path) -> Iterator[Proxy]:
    with served(played[1].url, tmp_path, policy={"content": "full"}) as found:
        yield found


def listed(proxy: Proxy, expected: int, **wanted: str) -> list[dict[str, Any]]:
    """Once there are as many as expected."""

    def found() -> list[dict[str, Any]]:
        with httpx.Client(base_url=proxy.host.admin_url) as client:
            answer = client.get("/incidents", params=wanted)
        incidents: list[dict[str, Any]] = answer.json()["incidents"]
        return incidents

    assert eventually(lambda: len(found()) >= expected)
    time.sleep(0.1)
    now = found()
    assert len(now) == expected
    return now


def say(proxy: Proxy, identity: str, body: object, **headers: str) -> httpx.Response:
    with httpx.Client(base_url=proxy.host.admin_url) as client:
        # As JSON may also be: what httpx would write of half a surrogate pair is an error.
        content = json.dumps(body)
        headers = {"content-type": "application/json", **headers}
        return client.post(f"/incidents/{identity}/label", content=content, headers=headers)


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("blocked", [{0: 0}, {0: 3}], ids=["prompt", "middle"])
def test_a_blocked_request_is_one_incident(
    engine: FakeEngine, proxy: Proxy, path: str, body: Any, stream: bool, blocked: dict[int, int]
) -> None:
    engine.script = Script(blocked=blocked)
    answer = proxy.post(path, body(stream=stream), {"x-request-id": "mine-1"})
    (row,) = listed(proxy, 1)
    assert row["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert (row["action"], row["mode"], row["policy"], row["stream"]) == ("block", "enforce", "default", stream)
    assert row["phase"] == ("prompt" if blocked == {0: 0} else "completion")
    assert row["bank"] == FINGERPRINT
    assert (row["label"], row["engine"], row["tenant"]) == (None, "main", None)
    assert {"layer", "direction", "position", "p_value", "score", "threshold"} <= row.keys()
    assert "content" not in row
    assert proxy.sample("undertow_incidents_total", action="block") == 1


def test_of_several_sequences_the_gravest_names_the_incident_and_all_are_in_it(
    engine: FakeEngine, proxy: Proxy
) -> None:
    engine.script = Script(flagged=True, blocked={1: 2})
    proxy.post(CHAT, chat_body(n=3))
    (row,) = listed(proxy, 1)
    whole = proxy.admin(f"/incidents/{row['id']}").json()
    assert row["action"] == "block"
    assert [each["choice_index"] for each in whole["sequences"] if each["action"] == "block"] == [1]
    assert len(whole["sequences"]) == 3


def test_what_is_allowed_or_could_not_be_judged_is_none(engine: FakeEngine, proxy: Proxy) -> None:
    proxy.post(CHAT, chat_body())
    engine.script = Script(fault="missing")
    assert proxy.post(CHAT, chat_body()).status_code == 503
    engine.script = Script(flagged=True)
    proxy.post(CHAT, chat_body())
    assert [row["action"] for row in listed(proxy, 1)] == ["flag"]


def test_a_score_that_is_no_number_is_null(engine: FakeEngine, proxy: Proxy) -> None:
    engine.script = Script(nan=True, flagged=True)
    proxy.post(CHAT, chat_body())
    (row,) = listed(proxy, 1)
    whole = proxy.admin(f"/incidents/{row['id']}")
    assert None in [score["score"] for each in whole.json()["sequences"] for score in each["scores"]]


def test_policies_say_what_of_the_text_is_kept(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    secret = "mail ada@example.org"
    rules = [{"match": {"model": name}, "override": {"content": name}} for name in ("hash", "redacted", "full")]
    engine.script = Script(flagged=True)
    with served(played[1].url, tmp_path, KEY, rules=rules) as proxy:
        kept: dict[str, Any] = {}
        for model in ("tuned", "hash", "redacted", "full"):
            proxy.post(CHAT, chat_body(model=model, messages=[{"role": "user", "content": secret}]))
            (row,) = listed(proxy, 1, model=model)
            kept[model] = proxy.admin(f"/incidents/{row['id']}").json()
    assert (kept["tuned"]["content_kind"], kept["tuned"]["content"]) == ("off", None)
    assert len(kept["hash"]["content"]) == 64
    assert "[email]" in kept["redacted"]["content"]
    assert json.loads(kept["full"]["content"])["messages"][0]["content"] == secret
    stored = (tmp_path / "incidents.db").read_bytes()
    assert stored.count(b"ada@example.org") >= 1
    assert KEY["UNDERTOW_HASH_KEY"].encode() not in stored


def test_hashes_without_a_key_are_an_error(played: tuple[FakeEngine, Host], tmp_path: Path) -> None:
    rules = [{"match": {"model": "x"}, "override": {"content": "hash"}}]
    with (
        pytest.raises(ConfigError, match=r"`rules\.0\.override\.content`: hash needs a key; expected one in UNDER"),
        served(played[1].url, tmp_path, rules=rules),
    ):
        pass


def test_labels_are_kept_counted_and_found_again(engine: FakeEngine, proxy: Proxy) -> None:
    engine.script = Script(blocked={0: 0})
    for _ in range(3):
        proxy.post(CHAT, chat_body())
    one, two, _ = listed(proxy, 3)
    assert say(proxy, one["id"], {"label": "true", "by": "ada", "note": "yes"}).json()["label"] == "true"
    assert say(proxy, one["id"], {"label": "unsure", "by": "bob"}).status_code == 200
    assert say(proxy, two["id"], {"label": "false", "by": "ada\0"}).status_code == 200
    history = proxy.admin(f"/incidents/{one['id']}").json()["history"]
    assert [(each["label"], each["by"], each["note"]) for each in history] == [
        ("true", "ada", "yes"),
        ("unsure", "bob", ""),
    ]
    assert [row["id"] for row in listed(proxy, 1, label="unsure")] == [one["id"]]
    assert proxy.sample("undertow_review_labels_total", label="true") == 1
    for label, count in {"true": 0, "false": 1, "unsure": 1, "none": 1}.items():
        assert eventually(lambda: proxy.sample("undertow_reviewed_incidents", label=label) == count), label  # noqa: B023


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"label": "maybe", "by": "ada"}, "`label`"),
        ({"label": "true"}, "`by`"),
        ({"label": "true", "by": ""}, "`by`"),
        ({"label": "true", "by": "ada", "more": 1}, "`more`"),
        ({"label": "true", "by": "half a pair: \ud800"}, "`by`"),
        ([], "dictionary"),
    ],
)
def test_a_label_that_is_none_is_refused_by_name(proxy: Proxy, body: object, said: str) -> None:
    answer = say(proxy, "0" * 32, body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_what_is_asked_wrongly_is_named(proxy: Proxy) -> None:
    assert say(proxy, "0" * 32, {"label": "true", "by": "ada"}).status_code == 404
    assert proxy.admin("/incidents/" + "0" * 32).status_code == 404
    assert proxy.admin("/incidents?limit=501").json()["error"]["message"].startswith("`limit`: ")
    assert proxy.admin("/incidents?modle=x").json()["error"]["message"].startswith("`modle`: ")
    assert "not a place" in proxy.admin("/incidents?after=x").json()["error"]["message"]


def test_another_site_cannot_label(proxy: Proxy, engine: FakeEngine) -> None:
    engine.script = Script(blocked={0: 0})
    proxy.post(CHAT, chat_body())
    (row,) = listed(proxy, 1)
    said = {"label": "false", "by": "mallory"}
    assert say(proxy, row["id"], said, **{"sec-fetch-site": "cross-site"}).status_code == 403
    with httpx.Client(base_url=proxy.host.admin_url) as client:
        plain = client.post(
            f"/incidents/{row['id']}/label", content=json.dumps(said), headers={"content-type": "text/plain"}
        )
    assert plain.status_code == 400, "what a form of another site can send"
    assert listed(proxy, 1)[0]["label"] is None


def test_clients_see_no_incidents_and_operators_need_the_token(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    with served(played[1].url, tmp_path, {"UNDERTOW_OPERATOR_TOKEN": TOKEN}) as proxy:
        for path in ("/incidents", "/", "/page/incidents.js"):
            assert proxy.get(path).status_code == 404
            assert proxy.admin(path).status_code == 401
            assert proxy.admin(path, authorization=f"Bearer {TOKEN}").status_code == 200


def test_with_the_database_gone_requests_are_judged_and_incidents_come_later(
    engine: FakeEngine,
    played: tuple[FakeEngine, Host],
    tmp_path: Path,
    postgres_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sqlalchemy import create_engine, text

    admin = create_engine(postgres_url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    config = tmp_path / "undertow.yaml"
    config.write_text("version: 1\nincidents: {path: null, url_env: DB}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DB", postgres_url)
        assert cli.main(["incidents", "migrate", "--config", str(config)]) == 0
    kept = {"path": None, "url_env": "DB", "spool": tmp_path / "spool"}
    engine.script = Script(blocked={0: 0})
    with served(played[1].url, tmp_path, {"DB": postgres_url}, incidents=kept) as proxy:
        proxy.post(CHAT, chat_body())
        listed(proxy, 1)
        with admin.connect() as connection:
            connection.execute(text("ALTER TABLE incidents RENAME TO away"))
        for _ in range(5):
            answer = proxy.post(CHAT, chat_body())
            assert answer.json()["error"]["code"] == "content_filter"
        assert eventually(lambda: (tmp_path / "spool").read_bytes().count(b"\n") == 5)
        away = proxy.admin("/incidents")
        assert (away.status_code, away.json()["error"]["message"]) == (
            503,
            "The database of incidents does not answer.",
        )
        assert proxy.admin("/readyz").status_code == 200, "a guard that judges is ready"
        with admin.connect() as connection:
            connection.execute(text("ALTER TABLE away RENAME TO incidents"))
        assert eventually(lambda: (tmp_path / "spool").stat().st_size == 0, within_s=10)
        listed(proxy, 6)
    told = repr([record.__dict__ for record in caplog.records])
    assert "pg-secret" not in told
    admin.dispose()


def test_the_command_line_lists_shows_labels_and_exports(
    engine: FakeEngine, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "undertow.yaml"
    config.write_text(f"version: 1\nincidents: {{path: {tmp_path / 'incidents.db'}}}\n")
    engine.script = Script(blocked={0: 0})
    proxy.post(CHAT, chat_body(model="evil\x1b[31m"))
    proxy.post(CHAT, chat_body())
    newest, oldest = listed(proxy, 2)
    words = ["--config", str(config)]
    assert cli.main(["incidents", "list", *words, "--label", "none"]) == 0
    out = capsys.readouterr().out
    assert newest["id"] in out
    assert "evil?[31m" in out
    assert cli.main(["incidents", "label", *words, oldest["id"], "false", "--by", "ada", "--note", "fine"]) == 0
    assert cli.main(["incidents", "show", *words, oldest["id"]]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["history"][0]["note"] == "fine"
    out_file = tmp_path / "clean.jsonl"
    assert cli.main(["incidents", "export", *words, "--reviewed", "--out", str(out_file)]) == 0
    (prompt,) = read_reviewed(out_file)
    assert MESSAGES[0]["content"] in repr(prompt)
    assert cli.main(["incidents", "export", *words, "--out", str(tmp_path / "all.jsonl")]) == 0
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    assert cli.main(["incidents", "show", *words, "nothing"]) == 2
    assert "there is no incident 'nothing'" in capsys.readouterr().err
    assert cli.main(["incidents", "export", *words, "--reviewed", "--label", "true", "--out", "-"]) == 2
    assert cli.main(["incidents", "list", "--config", str(tmp_path / "absent.yaml")]) == 2


def test_reviewed_prompts_without_their_text_cannot_be_exported(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.script = Script(blocked={0: 0})
    with served(played[1].url, tmp_path) as proxy:
        proxy.post(CHAT, chat_body())
        (row,) = listed(proxy, 1)
        say(proxy, row["id"], {"label": "false", "by": "ada"})
    config = tmp_path / "undertow.yaml"
    config.write_text(f"version: 1\nincidents: {{path: {tmp_path / 'incidents.db'}}}\n")
    out = tmp_path / "clean.jsonl"
    assert cli.main(["incidents", "export", "--config", str(config), "--reviewed", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "1 of 1 have no text to calibrate with" in err
    assert "nothing was written" in err
    assert not out.exists()
