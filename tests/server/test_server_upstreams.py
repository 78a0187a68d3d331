"""Several engines: which one is asked, when another one is, and what is never done."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .fake_engine import MODEL, Script, status
from .fleet import eventually, several
from .test_server_answers import CHAT, chat_body


def test_requests_go_to_the_engine_with_the_fewest_of_ours() -> None:
    patient = {"read_timeout_s": 30}
    with several("one", "two", one=patient, two=patient) as fleet, ThreadPoolExecutor(8) as pool:
        go = threading.Event()
        for engine in fleet.engines.values():
            engine.script = Script(until=go)
        answers = [pool.submit(fleet.proxy.post, CHAT, chat_body()) for _ in range(8)]
        eventually(lambda: sum(fleet.asked().values()) == 8)
        go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 8
        assert fleet.asked() == {"one": 4, "two": 4}


def test_a_request_for_a_model_goes_where_it_is_served() -> None:
    with several("one", "two", one={"models": ["left", "both"]}, two={"models": ["right", "both"]}) as fleet:
        for model, engine in (("left", "one"), ("right", "two")):
            before = fleet.asked()
            assert fleet.proxy.post(CHAT, chat_body(model=model)).status_code == 200
            assert fleet.asked() == {**before, engine: before[engine] + 1}
        answer = fleet.proxy.post(CHAT, chat_body(model="neither"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_models_are_those_of_all_engines_and_each_is_told_once() -> None:
    with several("one", "two") as fleet:
        fleet.engines["two"].models = (MODEL, "second")
        told = fleet.proxy.get("/v1/models").json()
        assert [entry["id"] for entry in told["data"]] == [MODEL, "second"]


def test_a_connection_that_is_refused_is_no_lost_request() -> None:
    with several("one", "two") as fleet:
        fleet.hosts["one"].stop(at_once=True)
        answers = [fleet.proxy.post(CHAT, chat_body(stream=index % 2 == 0)) for index in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert not any("error" in answer.text for answer in answers)
        eventually(lambda: not fleet.ready("one"))
        fleet.hosts["one"].start()
        eventually(lambda: fleet.ready("one"))


def test_an_engine_with_the_wrong_bank_is_out_of_rotation_and_says_so() -> None:
    pinned = {"fingerprint": "f" * 16}
    with several("one", "two", one=pinned, two=pinned) as fleet:
        fleet.engines["one"].status = status(fingerprint="e" * 16)
        eventually(lambda: not fleet.ready("one"))
        assert all(fleet.proxy.post(CHAT, chat_body()).status_code == 200 for _ in range(4))
        assert fleet.asked() == {"one": 0, "two": 4}
        told = fleet.proxy.admin("/readyz")
        assert (told.status_code, told.json()["engines"]["two"]["ready"]) == (200, True)
        assert "e" * 16 in told.json()["engines"]["one"]["reasons"]["guard"]


@pytest.mark.parametrize(("mode", "code"), [("enforce", "guard_unavailable"), ("monitor", None)])
def test_where_no_engine_is_guarded_as_it_should_be_only_monitor_passes(mode: str, code: str | None) -> None:
    pinned = {"fingerprint": "f" * 16}
    with several("one", "two", mode=mode, one=pinned, two=pinned) as fleet:
        for engine in fleet.engines.values():
            engine.status = status(fingerprint="e" * 16)
        eventually(lambda: not fleet.ready("one") and not fleet.ready("two"))
        answer = fleet.proxy.post(CHAT, chat_body())
        if code is None:
            assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "unguarded")
            return
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
        assert fleet.asked() == {"one": 0, "two": 0}
        assert fleet.metric("undertow_guard_failures_total", kind="no_handshake", mode="enforce") == 1
        assert fleet.proxy.admin("/readyz").status_code == 503


def test_with_every_engine_gone_a_request_is_answered_at_once() -> None:
    with several("one", "two") as fleet:
        for host in fleet.hosts.values():
            host.stop(at_once=True)
        began = time.monotonic()
        answer = fleet.proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert time.monotonic() - began < 5


def test_a_request_that_names_no_model_goes_where_the_first_engines_models_are() -> None:
    alike = {"models": ["left"]}
    with several("one", "two", "three", one=alike, two={"models": ["right"]}, three=alike) as fleet:
        body = chat_body()
        body.pop("model", None)
        assert [fleet.proxy.post(CHAT, body).status_code for _ in range(6)] == [200] * 6
        asked = fleet.asked()
        assert (asked["two"], asked["one"] + asked["three"]) == (0, 6)
