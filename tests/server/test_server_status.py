"""`undertow status`, against a fake engine and a real server."""

from __future__ import annotations

import json

import pytest

from guard.evidence import COVERAGE, VERDICTS, Status
from server import cli
from tests.ports import free_port

from .conftest import Proxy
from .fake_engine import FINGERPRINT, FakeEngine, Script
from .fake_engine import status as status_of
from .hosting import Host, hosted


def status(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["status", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_every_worker_and_every_check_is_told(
    alone: Proxy, played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = status(capsys, "--engine", played[1].url, "--server", alone.host.admin_url)
    assert code == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        "worker 0",
        "worker 1",
        "engine",
        "server",
    ]
    assert out.count(FINGERPRINT) == 2
    for told in (
        "layers             1 to 3",
        "density 0.002",
        "engine main",
        "canary           ok",
        "from the prefix cache",
        "generation         1 (as started)",
        "coverage           0 of 0 tokens\n",
        "last canary      20",
        ", scored, ",
    ):
        assert told in out
    assert "evidence channel   answers" in out


def test_what_could_not_be_scored_is_told_by_why(
    alone: Proxy, played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, host = played
    before = engine.status
    first, *others = before.workers
    broken = first.model_copy(update={"unscorable": 3, "faults": {"probe_missed": 2, "not_finite": 1}})
    engine.status = before.model_copy(update={"workers": (broken, *others), "channel": "silent"})
    try:
        _, out, _ = status(capsys, "--engine", host.url, "--server", alone.host.admin_url)
    finally:
        engine.status = before
    assert "unscorable         3 requests, 1 not_finite, 2 probe_missed" in out
    assert "evidence channel   silent" in out


def test_coverage_is_of_all_tokens_seen_and_never_rounded_up(
    alone: Proxy, engine: FakeEngine, played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"tokens_scored": 999_900, "tokens_recalled": 99, "tokens_missed": 1, "generation": 3}
    workers = tuple(worker.model_copy(update=counts) for worker in status_of().workers)
    engine.status = status_of().model_copy(update={"workers": workers})
    try:
        _, out, _ = status(capsys, "--engine", played[1].url, "--no-server")
    finally:
        engine.status = status_of()
    assert "coverage           999,999 of 1,000,000 tokens (99.99%)" in out
    assert "generation         3\n" in out


@pytest.mark.parametrize("name", [*COVERAGE, *VERDICTS])
def test_ranks_that_do_not_count_alike_are_told_and_not_well(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    first, second = engine.status.workers
    engine.status = Status(workers=(first, second.model_copy(update={name: 1234})))
    with hosted(engine.app) as host:
        code, out, _ = status(capsys, "--engine", host.url, "--no-server")
        assert code == 1
        assert f"the ranks differ in {name}: 0 by rank 0, 1234 by rank 1" in out
        assert status(capsys, "--engine", host.url, "--no-server", "--json")[0] == 1


def test_as_json_it_is_both_answers_whole(
    alone: Proxy, played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = status(capsys, "--engine", played[1].url, "--server", alone.host.admin_url, "--json")
    told = json.loads(out)
    assert code == 0
    assert [worker["rank"] for worker in told["engine"]["workers"]] == [0, 1]
    assert told["server"]["ready"] is True
    code, out, _ = status(capsys, "--engine", played[1].url, "--no-server", "--json")
    assert (code, json.loads(out)["server"]) == (0, None)


def test_a_server_that_is_not_ready_is_one_and_says_why(
    alone: Proxy, engine: FakeEngine, played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    engine.script = Script(guard_down=True)
    code, out, _ = status(capsys, "--engine", played[1].url, "--server", alone.host.admin_url)
    assert code == 1
    assert "canary           failed: the engine answered 503" in out


def test_who_does_not_answer_is_named(played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    code, _, err = status(capsys, "--engine", nowhere)
    assert code == 1
    assert f"{nowhere}: the engine does not answer" in err
    code, _, err = status(capsys, "--engine", played[1].url, "--server", nowhere)
    assert code == 1
    assert f"{nowhere}: the server does not answer" in err


def test_an_engine_without_the_guard_is_told_from_one_with_it(alone: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = status(capsys, "--engine", alone.host.admin_url, "--no-server")
    assert code == 1
    assert "the engine answered 404; is it guarded?" in err


@pytest.mark.parametrize("address", ["localhost", "ftp://localhost", "http://", ""])
def test_an_address_that_is_none_is_bad_input(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = status(capsys, "--engine", address)
    assert code == 2
    assert f"--engine: {address}, expected a URL" in err
