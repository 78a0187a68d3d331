"""API keys and quotas, without sockets."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError
from server import cli
from server.access.buckets import Bucket
from server.access.door import Door
from server.access.keys import KeyRefused, Keys, changed_keys, new_key, read_keys
from server.access.limiter import Client, Limiter
from server.config.access import AccessSettings, Quota
from server.config.settings import parse
from server.errors import ApiError, RateLimited

NOW = datetime(2026, 11, 23, 5, 0, tzinfo=UTC)
DAY = timedelta(days=1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_opens_and_nothing_else_does() -> None:
    key, record = new_key("lab", "", NOW, None)
    other, _ = new_key("lab", "", NOW, None)
    keys = Keys([record])
    assert keys.holder(key, NOW) == record
    identity, secret = key.split("_", 2)[1:]
    wrong = [
        other,
        key[:-1],
        key + "a",
        key[:-1] + ("A" if key[-1] != "A" else "B"),
        f"utk_{identity}_{'A' * 43}",
        f"utk_{'0' * 12}_{secret}",
        f"utk_{identity}_",
        secret,
        record.sha256,
        f"utk_{identity}_{record.sha256[:43]}",
        key.upper(),
        "",
        "\udcff",
    ]
    for each in wrong:
        with pytest.raises(KeyRefused, match=r"^Incorrect API key provided\.$"):
            keys.holder(each, NOW)


def test_an_expired_or_revoked_key_opens_nothing_and_only_its_holder_is_told() -> None:
    key, record = new_key("lab", "", NOW, NOW + DAY)
    keys = Keys([record])
    assert keys.holder(key, NOW + DAY - timedelta(seconds=1)) == record
    with pytest.raises(KeyRefused, match="expired"):
        keys.holder(key, NOW + DAY)
    with pytest.raises(KeyRefused, match="Incorrect"):
        keys.holder(key[:-2] + "zz", NOW + DAY)
    with pytest.raises(KeyRefused, match="revoked"):
        Keys([record.model_copy(update={"revoked": NOW})]).holder(key, NOW)


def test_the_file_holds_no_key_and_is_its_owners_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    assert cli.main(["keys", "create", "--file", str(file), "--tenant", "lab", "--label", "Ada\x1b[31m"]) == 0
    key = capsys.readouterr().out.strip()
    text = file.read_text()
    assert key not in text
    assert key.split("_", 2)[2] not in text
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file], "nothing half-written stays"
    assert Keys(read_keys(file)).holder(key, NOW + DAY).tenant == "lab"
    assert cli.main(["keys", "list", "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[1:3] == ["lab", "active"]
    assert "Ada?[31m" in out
    assert read_keys(file)[0].sha256 not in out
    assert cli.main(["keys", "revoke", "--file", str(file), key.split("_")[1]]) == 0
    with pytest.raises(KeyRefused, match="revoked"):
        Keys(read_keys(file)).holder(key, NOW + DAY)
    assert cli.main(["keys", "revoke", "--file", str(file), "0123456789ab"]) == 2
    assert "has no key of the id '0123456789ab'" in capsys.readouterr().err
    assert len(read_keys(file)) == 1, "a revoked key is kept: who had it can still be told"


def test_an_expiry_is_a_time_from_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    assert cli.main(["keys", "create", "--file", str(file), "--tenant", "lab", "--expires", "90d"]) == 0
    (record,) = read_keys(file)
    assert record.expires is not None
    assert record.expires - record.created == timedelta(days=90)
    with pytest.raises(SystemExit) as ended:
        cli.main(["keys", "create", "--file", str(file), "--tenant", "lab", "--expires", "soon"])
    assert ended.value.code == 2
    assert "found 'soon'; expected a number and m, h or d" in capsys.readouterr().err
    assert cli.main(["keys", "create", "--file", str(file), "--tenant", "Lab!"]) == 2
    assert "`tenant`: found 'Lab!'" in capsys.readouterr().err
    assert len(read_keys(file)) == 1


def test_keys_that_are_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def make() -> None:
        with changed_keys(file, create=True) as records:
            records.append(new_key("lab", "", NOW, None)[1])

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(file)) == 16


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Invalid JSON"),
        ("{}", "`version`: Field required"),
        ('{"version": 2, "keys": []}', "`version`: Input should be 1"),
        ('{"version": 1, "keys": [{"id": "x"}]}', "`keys.0.id`: String should match pattern"),
        ('{"version": 1, "keys": [], "more": 1}', "`more`: Extra inputs are not permitted"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_keys(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert said in str(raised.value)


def test_a_hash_that_is_wrong_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    record = new_key("lab", "", NOW, None)[1].model_dump(mode="json", exclude_none=True)
    file.write_text(json.dumps({"version": 1, "keys": [{**record, "sha256": record["sha256"][:-1]}]}))
    with pytest.raises(ConfigError) as raised:
        read_keys(file)
    assert record["sha256"][:8] not in str(raised.value)
    file.write_text(json.dumps({"version": 1, "keys": [record, record]}))
    with pytest.raises(ConfigError, match=f"two keys have the id {record['id']}"):
        read_keys(file)


def test_limits_without_keys_are_an_error() -> None:
    with pytest.raises(ConfigError, match="limits are kept by key; expected `keys_file`"):
        parse("version: 1\naccess: {limits: {requests_per_minute: 5}}", "x.yaml", {})
    with pytest.raises(ConfigError, match=r"`access\.limits\.requests_per_minute`: found 0"):
        parse("version: 1\naccess: {limits: {requests_per_minute: 0}}", "x.yaml", {})


@pytest.mark.parametrize("said", [None, "", "Basic x", "Bearer", "Bearer  ", "KEY"])
def test_without_a_bearer_key_the_door_stays_shut(tmp_path: Path, said: str | None) -> None:
    key, record = new_key("lab", "", NOW, None)
    door = Door(AccessSettings(keys_file=tmp_path / "x"), Keys([record]), lambda: NOW)
    with pytest.raises(ApiError) as raised:
        door.admit(said.replace("KEY", key) if said else said)
    assert (raised.value.status, raised.value.code) == (401, "invalid_api_key")
    assert door.admit(f"bearer {key}") == Client(record.id, "lab", Quota())


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 600), st.floats(0, 50)), max_size=30),
)
def test_a_bucket_never_gives_more_than_its_rate_and_one_minute(
    per_minute: int, asked: list[tuple[float, float]]
) -> None:
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, 0.0
    for pause, count in asked:
        now += pause
        if bucket.wait(count, now) == 0:
            bucket.take(count, now)
            taken += count
        assert taken <= per_minute * (1 + now / 60) + 1e-6
        assert bucket.level(now) <= per_minute
    wait = bucket.wait(1, now)
    assert bucket.wait(1, now + wait) <= 1e-6


def test_a_minutes_requests_may_come_at_once_and_then_at_their_rate() -> None:
    clock = Clock()
    limiter, client = Limiter(clock), Client("a", "lab", Quota(requests_per_minute=3))
    for _ in range(3):
        with limiter.admit(client):
            pass
    with pytest.raises(RateLimited) as raised:
        limiter.admit(client)
    assert raised.value.limit == "requests_per_minute"
    assert raised.value.headers["retry-after"] == "20"
    assert raised.value.headers["x-ratelimit-remaining-requests"] == "0"
    with limiter.admit(Client("b", "lab", client.quota)):
        """Another key has its own."""
    clock.now += 20
    with limiter.admit(client):
        pass
    with pytest.raises(RateLimited):
        limiter.admit(client)


def test_a_debt_of_tokens_is_paid_before_the_next_request() -> None:
    clock = Clock()
    limiter, client = Limiter(clock), Client("a", "lab", Quota(tokens_per_minute=60))
    with limiter.admit(client) as slot:
        slot.spend(160)
    with pytest.raises(RateLimited) as raised:
        limiter.admit(client)
    assert (raised.value.limit, raised.value.headers["retry-after"]) == ("tokens_per_minute", "101")
    clock.now += 100.9
    with pytest.raises(RateLimited):
        limiter.admit(client)
    clock.now += 0.2
    with limiter.admit(client) as slot:
        assert slot.headers["x-ratelimit-limit-tokens"] == "60"


def test_places_are_given_back_also_where_one_was_refused() -> None:
    limiter = Limiter(Clock())
    client = Client("a", "lab", Quota(concurrent_requests=2, concurrent_streams=1))
    with limiter.admit(client) as first:
        first.streams()
        with limiter.admit(client) as second:
            with pytest.raises(RateLimited) as raised:
                second.streams()
            assert raised.value.limit == "concurrent_streams"
            with pytest.raises(RateLimited) as raised:
                limiter.admit(client)
            assert raised.value.limit == "concurrent_requests"
        with limiter.admit(client):
            pass
    with limiter.admit(client) as again:
        again.streams()


def test_another_quota_holds_at_once_and_forgets_nothing() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    for _ in range(4):
        limiter.admit(Client("a", "lab", Quota(requests_per_minute=5)))
    assert limiter.admit(Client("a", "lab", Quota(requests_per_minute=100))).headers[
        "x-ratelimit-remaining-requests"
    ] == str(100 - 5)
    with pytest.raises(RateLimited):
        limiter.admit(Client("a", "lab", Quota(requests_per_minute=2)))
    limiter.admit(Client("a", "lab", Quota()))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"keys\.json: is not UTF-8"):
        read_keys(tmp_path / "keys.json")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), changed_keys(tmp_path / "none" / "keys.json"):
        pass
