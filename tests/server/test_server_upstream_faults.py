"""Engines that die, are slow, cut, lie or lose their guard, one of two: nothing passes unguarded, nothing hangs,
nothing is generated twice that a client began to read, and every fault is counted by engine."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from random import Random

import httpx
import pytest

from server.config.sections import Limits

from .fake_engine import CALIBRATION, FINGERPRINT, FakeEngine, Script, status
from .fleet import Several, eventually, several
from .test_server_answers import CHAT, chat_body, events
from .test_server_failures import error_code


@contextmanager
def first_of_two(**upstream: dict[str, object]) -> Iterator[tuple[Several, FakeEngine, FakeEngine]]:
    """Two engines, of which the first is asked: the second works on something else the whole time."""
    with several("one", "two", **upstream) as fleet:
        one, two = fleet.engines["one"], fleet.engines["two"]
        long = Script(tokens=("and",) * 1000, token_delay_s=0.2)
        two.script = long
        done = threading.Event()

        def occupy() -> None:
            with (
                httpx.Client(base_url=fleet.proxy.url, verify=False, timeout=60) as client,
                client.stream("POST", CHAT, json=chat_body(stream=True)),
            ):
                done.wait(60)

        # Both are free, so it may go to either: whichever has it is the one that is busy.
        thread = threading.Thread(target=occupy, daemon=True)
        one.script = long
        thread.start()
        eventually(lambda: sum(fleet.asked().values()) == 1)
        fleet.running = 1
        busy = next(name for name, count in fleet.asked().items() if count)
        free = "one" if busy == "two" else "two"
        for engine in fleet.engines.values():
            engine.script = Script()
            engine.bodies.clear()
        try:
            yield fleet, fleet.engines[free], fleet.engines[busy]
        finally:
            done.set()
            thread.join(10)


def name_of(fleet: Several, engine: FakeEngine) -> str:
    return next(name for name, each in fleet.engines.items() if each is engine)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_declines_is_passed_over(stream: bool) -> None:
    with first_of_two() as (fleet, first, second):
        first.script = Script(guard_down=True)
        answer = fleet.proxy.post(CHAT, chat_body(stream=stream))
        assert (answer.status_code, b"42" in answer.content) == (200, True)
        assert len(second.bodies) == 1
        name = name_of(fleet, first)
        assert fleet.errors(name, "status") >= 1
        assert fleet.metric("undertow_engine_passed_over_total", engine=name) == 1


def test_where_all_decline_the_answer_is_theirs() -> None:
    with several("one", "two") as fleet:
        for engine in fleet.engines.values():
            engine.script = Script(guard_down=True)
        answer = fleet.proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")


@pytest.mark.parametrize(
    ("script", "status_code", "code", "kind"),
    [
        (Script(cut_after=0), 503, "upstream_unavailable", "cut"),
        (Script(status=500), 500, "500", "status"),
        (Script(delay_s=2), 504, "upstream_timeout", "timeout"),
        (Script(garbage=True), 503, "guard_unavailable", "response_invalid"),
        (Script(fault="missing"), 503, "guard_unavailable", "evidence_missing"),
        (Script(fault="silent"), 503, "guard_unavailable", "channel_silent"),
        (Script(fault="other_bank"), 503, "guard_unavailable", "fingerprint"),
        (Script(fault="short"), 503, "guard_unavailable", "coverage"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value,
)
def test_what_may_have_been_generated_is_asked_of_no_other_engine(
    script: Script, status_code: int, code: object, kind: str
) -> None:
    patience = {"read_timeout_s": 1 if kind == "timeout" else 4}
    with first_of_two(one=patience, two=patience) as (fleet, first, second):
        first.script = script
        answer = fleet.proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (status_code, code)
        assert (len(first.bodies), len(second.bodies)) == (1, 0)
        assert fleet.errors(name_of(fleet, first), kind) == 1
        assert fleet.errors(name_of(fleet, second), kind) == 0


@pytest.mark.parametrize("cut_after", [0, 3])
def test_a_stream_that_was_cut_is_asked_of_no_other_engine(cut_after: int) -> None:
    with first_of_two() as (fleet, first, second):
        first.script = Script(cut_after=cut_after)
        answer = fleet.proxy.post(CHAT, chat_body(stream=True))
        *_, error, done = events(answer.content)
        assert (error_code(error), done) == ("upstream_cut", b"data: [DONE]\n\n")
        assert (len(first.bodies), len(second.bodies)) == (1, 0)
        assert fleet.errors(name_of(fleet, first), "cut") == 1


def test_a_kept_connection_that_closes_under_a_request_loses_none() -> None:
    with several("one", "two", behind_relays=True) as fleet:
        for _ in range(4):
            assert fleet.proxy.post(CHAT, chat_body()).status_code == 200
        for relay in fleet.relays.values():
            relay.mode = "drop_kept"
        before = sum(fleet.asked().values())
        answers = [fleet.proxy.post(CHAT, chat_body(stream=index % 2 == 0)) for index in range(4)]
        harmed = sum(relay.harmed for relay in fleet.relays.values())
        assert harmed >= 1
        assert [answer.status_code for answer in answers] == [200] * 4
        assert sum(fleet.asked().values()) == before + 4


def test_a_request_whose_connections_close_again_and_again_is_repeated_once() -> None:
    with several("one", "two", behind_relays=True) as fleet:
        for relay in fleet.relays.values():
            relay.mode = "drop_all"
        answer = fleet.proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert 1 <= sum(relay.harmed for relay in fleet.relays.values()) <= 2


def test_an_engine_whose_requests_fail_in_a_row_is_left_alone_until_a_canary_comes_through() -> None:
    with several("one", behind_relays=True, one={"read_timeout_s": 1}) as fleet:
        engine, relay = fleet.engines["one"], fleet.relays["one"]
        engine.script = Script(fault="missing")  # so that canaries fail as well
        relay.mode = "swallow"
        with ThreadPoolExecutor(5) as pool:
            codes = list(pool.map(lambda _: fleet.proxy.post(CHAT, chat_body()).status_code, range(5)))
        assert codes == [504] * 5
        assert fleet.errors("one", "timeout") == 5
        assert fleet.metric("undertow_engine_breaker_open", engine="one") == 1
        harmed, began = relay.harmed, time.monotonic()
        answer = fleet.proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert time.monotonic() - began < 0.5
        assert relay.harmed == harmed
        engine.script, relay.mode = Script(), "pass"
        eventually(lambda: fleet.metric("undertow_engine_breaker_open", engine="one") == 0)
        assert fleet.proxy.post(CHAT, chat_body()).status_code == 200


def test_requests_that_fail_do_not_keep_an_engine_out_whose_canary_comes_through() -> None:
    """Who sends requests that fail must not take the engine from everybody."""
    with several("one") as fleet:
        engine = fleet.engines["one"]
        for _ in range(6):
            engine.script = Script(cut_after=0)
            assert fleet.proxy.post(CHAT, chat_body()).status_code == 503
        engine.script = Script()
        eventually(lambda: fleet.ready("one"), within_s=1)
        assert fleet.proxy.post(CHAT, chat_body()).status_code == 200


def test_an_engine_whose_canary_fails_is_asked_last() -> None:
    with several("one", "two") as fleet:
        fleet.engines["one"].script = Script(fault="short")
        assert fleet.proxy.admin("/readyz").status_code == 200
        assert not fleet.ready("one")
        assert all(fleet.proxy.post(CHAT, chat_body()).status_code == 200 for _ in range(4))
        assert fleet.asked() == {"one": 0, "two": 4}
        fleet.hosts["two"].stop(at_once=True)
        assert fleet.proxy.post(CHAT, chat_body()).json()["error"]["code"] == "guard_unavailable"


def test_evidence_is_held_against_the_engine_that_answered() -> None:
    other, patient = ("a" * 16, CALIBRATION), {"read_timeout_s": 30}
    with several("one", "two", one=patient, two=patient) as fleet:
        fleet.engines["two"].script = Script(guard=other)
        fleet.engines["two"].status = status(fingerprint=other[0])
        eventually(lambda: fleet.metric("undertow_engine_info", engine="two", fingerprint=other[0]) == 1)
        eventually(lambda: fleet.ready("two"))
        with ThreadPoolExecutor(6) as pool:
            go = threading.Event()
            for engine in fleet.engines.values():
                engine.script = Script(guard=engine.script.guard, until=go)
            answers = [pool.submit(fleet.proxy.post, CHAT, chat_body()) for _ in range(6)]
            eventually(lambda: sum(fleet.asked().values()) == 6)
            go.set()
            assert [answer.result().status_code for answer in answers] == [200] * 6
        assert fleet.asked() == {"one": 3, "two": 3}
        # The first one's evidence now names what the second one is known to guard with.
        fleet.hosts["two"].stop(at_once=True)
        fleet.engines["one"].script = Script(guard=other)
        answer = fleet.proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")
        assert fleet.errors("one", "fingerprint") == 1


def test_a_request_waits_for_room_and_is_told_when_there_is_none() -> None:
    limits = Limits(engine_wait_s=2)
    one = {"max_connections": 2, "read_timeout_s": 30}
    with several("one", limits=limits, one=one) as fleet, ThreadPoolExecutor(6) as pool:
        engine = fleet.engines["one"]

        def ask(count: int) -> list[Future[httpx.Response]]:
            return [pool.submit(fleet.proxy.post, CHAT, chat_body()) for _ in range(count)]

        go = threading.Event()
        engine.script = Script(until=go)
        answers = ask(2)
        eventually(lambda: len(engine.bodies) == 2)
        answers += ask(2)
        time.sleep(0.3)
        assert len(engine.bodies) == 2, "two at once, two that wait"
        go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 4

        engine.script = Script(until=(go := threading.Event()))
        served = ask(2)
        eventually(lambda: len(engine.bodies) == 6)
        began = time.monotonic()
        refused = [answer.result() for answer in ask(2)]
        assert time.monotonic() - began >= limits.engine_wait_s
        assert [answer.status_code for answer in refused] == [503] * 2, "no room in time"
        assert {answer.json()["error"]["code"] for answer in refused} == {"upstream_busy"}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        go.set()
        assert [answer.result().status_code for answer in served] == [200] * 2
        assert len(engine.bodies) == 6
        assert fleet.metric("undertow_upstream_errors_total", kind="busy") == 2
        assert fleet.metric("undertow_engine_inflight_requests", engine="one") == 0


def test_a_client_that_leaves_while_it_waits_for_room_leaves_the_queue() -> None:
    with several("one", one={"max_connections": 1}, limits=Limits(engine_wait_s=5)) as fleet:
        fleet.engines["one"].script = Script(delay_s=0.8)
        with ThreadPoolExecutor(2) as pool:
            working = pool.submit(fleet.proxy.post, CHAT, chat_body())
            eventually(lambda: fleet.asked() == {"one": 1})
            with httpx.Client(base_url=fleet.proxy.url, verify=False) as client, pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=chat_body(), timeout=0.2)
            assert working.result().status_code == 200
        assert fleet.proxy.post(CHAT, chat_body()).status_code == 200
        assert fleet.asked() == {"one": 2}


def test_engines_that_come_and_go_under_load_lose_nothing_that_could_be_kept() -> None:
    """Three engines; one is killed, started, and given a wrong bank again and again, while clients ask."""
    seconds, pinned = 6.0, {"fingerprint": FINGERPRINT, "read_timeout_s": 20}
    with several("one", "two", "three", one=pinned, two=pinned, three=pinned) as fleet:
        for engine in fleet.engines.values():
            engine.script = Script(token_delay_s=0.01)
        files = len(os.listdir("/proc/self/fd"))
        until = time.monotonic() + seconds

        def operate() -> int:
            """How often an engine was killed or given the wrong bank."""
            random, times = Random(5), 0
            while time.monotonic() < until:
                times += 1
                name = random.choice(["one", "two"])
                host, engine = fleet.hosts[name], fleet.engines[name]
                if random.random() < 0.5:
                    host.stop(at_once=True)
                    time.sleep(0.3)
                    host.start()
                else:
                    engine.status = status(fingerprint="e" * 16)
                    engine.script = Script(token_delay_s=0.01, guard=("e" * 16, CALIBRATION))
                    time.sleep(0.4)
                    engine.status, engine.script = status(), Script(token_delay_s=0.01)
                time.sleep(0.3)
            return times

        def ask(client: int) -> Counter[str]:
            found: Counter[str] = Counter()
            asked = 0
            with httpx.Client(base_url=fleet.proxy.url, timeout=20, verify=False) as http:
                while time.monotonic() < until:
                    asked += 1
                    stream = bool(asked % 2)
                    answer = http.post(
                        CHAT, json=chat_body(stream=stream), headers={"x-request-id": f"c{client}-{asked}"}
                    )
                    found[read(answer, stream)] += 1
            return found

        with ThreadPoolExecutor(9) as pool:
            operator = pool.submit(operate)
            counts = sum(pool.map(ask, range(8)), Counter[str]())
            times = operator.result()
        total = counts.total()
        eventually(lambda: fleet.metric("undertow_inflight_requests") == 0)
        for name in fleet.engines:
            assert fleet.metric("undertow_engine_inflight_requests", engine=name) == 0
        evaluated = fleet.metric("undertow_evaluated_total", endpoint="chat_completions")
        eligible = fleet.metric("undertow_eligible_total", endpoint="chat_completions")
        failed = sum(
            fleet.metric("undertow_guard_failures_total", kind=kind, mode="enforce")
            for kind in ("no_handshake", "fingerprint", "evidence_missing", "coverage")
        )
        assert counts["ok"] == evaluated, "whatever a client got whole was judged"
        assert eligible == evaluated + failed
        assert counts["unguarded"] == 0
        # What may be lost is what an engine had begun when it was killed, or was judged by a bank not known.
        assert set(counts) <= {"ok", "upstream_cut", "upstream_unavailable", "guard_unavailable"}
        assert total - counts["ok"] <= 8 * times, "of each client one request at a time"
        assert counts["ok"] > total / 2
        generated = Counter(
            headers["x-request-id"]
            for engine in fleet.engines.values()
            for headers in engine.headers
            if "x-request-id" in headers
        )
        assert max(generated.values()) <= 2
        repeated = sum(count == 2 for count in generated.values())
        passed_over = sum(fleet.metric("undertow_engine_passed_over_total", engine=name) for name in fleet.engines)
        assert repeated <= passed_over, "sent twice only where that was told"
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= files + 20)


def read(answer: httpx.Response, stream: bool) -> str:
    """What became of a request: `ok`, the code of its error, or `unguarded`."""
    if answer.headers.get("x-undertow-action") == "unguarded":
        return "unguarded"
    if not stream or answer.status_code != 200:
        return "ok" if answer.status_code == 200 else str(answer.json()["error"]["code"])
    *_, last, done = events(answer.content)
    assert done == b"data: [DONE]\n\n"
    return error_code(last) if b'"error"' in last else "ok"
