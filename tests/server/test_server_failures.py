"""What cannot be judged does not pass in enforce, passes and says so in monitor; what breaks recovers."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import httpx
import openai
import pytest

from guard.evidence import Status
from server.app import create_app
from server.errors import FAILURE_KINDS

from .conftest import KEY, Proxy, settings_for
from .fake_engine import MODEL, RESERVED, EvidenceFault, FakeEngine, Script, status
from .hosting import Host, hosted
from .test_server_answers import CHAT, MESSAGES, TEXT, chat_body, events, text_body

KIND_OF: dict[EvidenceFault, str] = {
    "missing": "evidence_missing",
    "no_final": "evidence_missing",
    "silent": "channel_silent",
    "invalid": "evidence_invalid",
    "other_bank": "fingerprint",
    "short": "coverage",
    "unscored_prompt": "coverage",
    "missing_record": "coverage",
    "unscorable": "unscorable",
    "not_finite": "not_finite",
    "mode": "policy",
}
ENFORCE_ONLY = {"mode"}


def error_code(event: bytes) -> str:
    code: str = json.loads(event.removeprefix(b"data: "))["error"]["code"]
    return code


def eventually(true: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.02)
    return true()


def test_every_evidence_fault_is_tried() -> None:
    assert set(KIND_OF) == set(get_args(EvidenceFault))
    assert set(KIND_OF.values()) < set(FAILURE_KINDS)


@pytest.mark.parametrize("fault", KIND_OF)
def test_enforce_answers_503_when_the_evidence_does_not_hold(
    engine: FakeEngine, enforce: Proxy, fault: EvidenceFault
) -> None:
    kind = KIND_OF[fault]
    before = enforce.sample("undertow_guard_failures_total", kind=kind, mode="enforce")
    engine.script = Script(fault=fault)
    answer = enforce.post(CHAT, chat_body())
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "guard_unavailable"
    assert answer.json()["error"]["type"] == "server_error"
    assert "x-undertow-action" not in answer.headers
    assert b"answer is" not in answer.content
    assert enforce.sample("undertow_guard_failures_total", kind=kind, mode="enforce") == before + 1


@pytest.mark.parametrize("fault", KIND_OF)
def test_enforce_releases_nothing_unjudged_in_a_stream(
    engine: FakeEngine, enforce: Proxy, fault: EvidenceFault
) -> None:
    engine.script = Script(fault=fault)
    answer = enforce.post(CHAT, chat_body(stream=True))
    if fault in ("short", "no_final"):  # Seen at the end only.
        *_, error, done = events(answer.content)
        assert (error_code(error), done) == ("guard_unavailable", b"data: [DONE]\n\n")
        assert b'"length"' not in answer.content, "the last chunk waits for the final evidence"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a log line carries beside its message."""
    found: dict[str, Any] = record.__dict__.get("fields", {})
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [fault for fault in KIND_OF if fault not in ENFORCE_ONLY])
def test_monitor_lets_unjudged_requests_pass_counts_them_and_says_so_in_the_log(
    engine: FakeEngine, monitor: Proxy, fault: EvidenceFault, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = monitor.sample("undertow_requests_total", endpoint="chat_completions", outcome="unguarded")
    engine.script = Script(fault=fault)
    answer = monitor.post(CHAT, chat_body(stream=stream))
    assert answer.status_code == 200
    assert b"42" in answer.content
    late = stream and fault in ("short", "no_final")
    assert answer.headers["x-undertow-action"] == ("pending" if late else "unguarded")
    assert eventually(
        lambda: (
            monitor.sample("undertow_requests_total", endpoint="chat_completions", outcome="unguarded") == before + 1
        )
    )
    # By request: a line of the test before may come late.
    ours = [record for record in caplog.records if fields(record).get("request_id") == answer.headers["x-request-id"]]
    assert [record.levelname for record in ours if record.message == "guard failure"] == ["CRITICAL"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_reserved_token_without_a_block_in_evidence_is_a_guard_failure(
    engine: FakeEngine, enforce: Proxy, stream: bool
) -> None:
    engine.script = Script(unexplained_stop=True)
    answer = enforce.post(TEXT, text_body(stream=stream))
    if stream:
        assert error_code(events(answer.content)[-2]) == "guard_unavailable"
    else:
        assert answer.status_code == 503
    assert str(RESERVED).encode() not in answer.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_read_does_not_pass(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    engine.script = Script(garbage=True)
    answer = enforce.post(CHAT, chat_body(stream=stream))
    content = events(answer.content)[-2] if stream else b"data: " + answer.content
    assert error_code(content) == "guard_unavailable"
    assert b"html" not in answer.content
    assert b"not json" not in answer.content


def test_a_score_that_is_not_a_number_can_be_read_and_counted(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(nan=True)
    assert enforce.post(CHAT, chat_body()).status_code == 200
    assert "undertow_exceedance_sum{" in enforce.admin("/metrics").text
    assert "Inf\n" not in enforce.admin("/metrics").text.replace('le="+Inf"', "")


@pytest.mark.parametrize("fault", ["unscorable", "not_finite"])
@pytest.mark.parametrize("script", [{"status": 500}, {"error_in_stream": True}], ids=["full", "stream"])
def test_an_error_of_the_engine_does_not_hide_that_it_could_not_score(
    engine: FakeEngine, enforce: Proxy, fault: EvidenceFault, script: dict[str, Any]
) -> None:
    """The worker ends what it could not score, and a grammar may make an error of that."""
    before = enforce.sample("undertow_guard_failures_total", kind=fault, mode="enforce")
    engine.script = Script(fault=fault, **script)
    answer = enforce.post(CHAT, chat_body(stream="status" not in script))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")
    assert enforce.sample("undertow_guard_failures_total", kind=fault, mode="enforce") == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_passes_as_it_is(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    before = enforce.sample("undertow_eligible_total", endpoint="chat_completions")
    engine.script = Script(status=400)
    answer = enforce.post(CHAT, chat_body(stream=stream))
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["error"]["message"]
    assert enforce.sample("undertow_eligible_total", endpoint="chat_completions") == before
    engine.script = Script(status=500)
    assert enforce.post(CHAT, chat_body(stream=stream)).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_that_does_not_answer_inside_the_engine_counts_as_a_guard_failure(
    engine: FakeEngine, enforce: Proxy, stream: bool
) -> None:
    before = enforce.sample("undertow_requests_total", endpoint="chat_completions", outcome="guard_failed")
    engine.script = Script(guard_down=True)
    answer = enforce.post(CHAT, chat_body(stream=stream))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")
    assert enforce.sample("undertow_requests_total", endpoint="chat_completions", outcome="guard_failed") == before + 1


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_a_stream_that_begins_with_an_error_is_answered_with_that_error(
    engine: FakeEngine, request: pytest.FixtureRequest, mode: str
) -> None:
    proxy: Proxy = request.getfixturevalue(mode)
    engine.script = Script(error_first=True)
    answer = proxy.post(CHAT, chat_body(stream=True))
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Internal server error")


@pytest.mark.parametrize("cut_after", [0, 1, 2, 4, 6])
def test_an_engine_that_dies_mid_stream_leaves_a_well_formed_end(
    engine: FakeEngine, enforce: Proxy, cut_after: int
) -> None:
    engine.script = Script(cut_after=cut_after)
    answer = enforce.post(CHAT, chat_body(stream=True))
    *released, error, done = events(answer.content)
    assert (error_code(error), done) == ("upstream_cut", b"data: [DONE]\n\n")
    # The role, then all tokens but the newest.
    assert len(released) == min(cut_after, 1) + max(0, cut_after - 2)
    engine.script = Script()
    assert enforce.post(CHAT, chat_body(stream=True)).content.endswith(b"data: [DONE]\n\n")


def test_a_stream_that_ends_without_done_is_a_cut(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(no_done=True)
    *_, error, done = events(enforce.post(CHAT, chat_body(stream=True)).content)
    assert (error_code(error), done) == ("upstream_cut", b"data: [DONE]\n\n")


def test_the_openai_client_sees_a_cut_as_an_error(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(cut_after=3)
    with enforce.openai() as client, pytest.raises(openai.APIError, match="stopped answering"):
        list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))


def test_an_engine_that_dies_before_the_answer_is_complete_is_a_503(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(cut_after=0)
    answer = enforce.post(CHAT, chat_body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")


def test_an_engine_that_is_silent_too_long_is_a_504(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(delay_s=6)
    answer = enforce.post(CHAT, chat_body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")


def test_a_dead_engine_is_a_503_and_its_return_is_found_without_a_restart() -> None:
    engine = FakeEngine()
    upstream = Host(engine.app)
    with hosted(create_app(settings_for(upstream.url)), "on") as host:
        proxy = Proxy(host)
        answer = proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert proxy.admin("/readyz").json()["engines"]["main"]["reasons"]["upstream"]
        upstream.start()
        assert eventually(lambda: proxy.post(CHAT, chat_body()).status_code == 200)
        upstream.stop(at_once=True)
        assert proxy.post(CHAT, chat_body()).status_code == 503
        engine.status = status(fingerprint="e" * 16)  # It comes back with another bank; evidence is still of the old.
        upstream.start()
        assert eventually(lambda: proxy.post(CHAT, chat_body()).json()["error"]["code"] == "guard_unavailable")
        engine.status = status()
        assert eventually(lambda: proxy.post(CHAT, chat_body()).status_code == 200)
        upstream.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_a_client_that_leaves_cancels_the_engines_work(
    engine: FakeEngine, request: pytest.FixtureRequest, mode: str, stream: bool
) -> None:
    proxy: Proxy = request.getfixturevalue(mode)
    before = proxy.sample("undertow_requests_total", endpoint="chat_completions", outcome="client_gone")
    engine.script = Script(delay_s=0.0 if stream else 1.5, token_delay_s=0.2)
    with httpx.Client(base_url=proxy.url, verify=False) as client:
        if stream:
            with client.stream("POST", CHAT, json=chat_body(stream=True)) as answer:
                next(answer.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=chat_body(), timeout=0.3)
    assert eventually(lambda: engine.aborted == 1)
    assert eventually(
        lambda: (
            proxy.sample("undertow_requests_total", endpoint="chat_completions", outcome="client_gone") == before + 1
        )
    )
    assert eventually(lambda: proxy.sample("undertow_inflight_requests") == 0)


def test_a_client_that_leaves_before_its_stream_opens_cancels_the_engines_work(
    engine: FakeEngine, enforce: Proxy
) -> None:
    engine.script = Script(delay_s=1.5)
    with httpx.Client(base_url=enforce.url, verify=False) as client, pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat_body(stream=True), timeout=0.3)
    assert eventually(lambda: engine.aborted == 1)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (status(fingerprint="e" * 16), "eeeeeeeeeeeeeeee"),
        (status(supported_fpr=0.05), "supports 0.05 and above for density;"),
        (status(workers=0), "no worker"),
        (
            status().model_copy(update={"workers": (*status().workers[:1], status(fingerprint="a" * 16).workers[1])}),
            "do not agree on the fingerprint",
        ),
        (
            status().model_copy(
                update={"workers": tuple(worker.model_copy(update={"detectors": ()}) for worker in status().workers)}
            ),
            "`density`",
        ),
    ],
    ids=["other bank", "too little data", "no guard", "workers differ", "no detector"],
)
def test_an_engine_that_does_not_fit_the_settings_is_not_ready_and_serves_nothing(broken: Any, said: str) -> None:
    engine = FakeEngine()
    engine.status = broken
    with (
        hosted(engine.app) as upstream,
        hosted(create_app(settings_for(upstream.url, fingerprint="f" * 16)), "on") as host,
    ):
        proxy = Proxy(host)
        answer = proxy.admin("/readyz")
        assert answer.status_code == 503
        assert said in answer.json()["engines"]["main"]["reasons"]["guard"]
        answer = proxy.post(CHAT, chat_body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")
        assert engine.bodies == [], "what could not be judged never reached the model"


def test_ranks_that_judge_differently_are_told_in_the_log_once_and_serve(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    first, second = status().workers
    engine.status = Status(workers=(first, second.model_copy(update={"blocked": 2})))
    caplog.set_level(logging.ERROR)
    with hosted(engine.app) as upstream, hosted(create_app(settings_for(upstream.url)), "on") as host:
        for _ in range(2):
            assert Proxy(host).admin("/readyz").status_code == 200
    ours = [record for record in caplog.records if record.message == "the engine's ranks judge differently"]
    assert [fields(record)["reason"] for record in ours] == ["blocked: 0 by rank 0, 2 by rank 1"]


def test_monitor_passes_without_a_handshake_and_says_unguarded() -> None:
    engine = FakeEngine()
    engine.status = status(workers=0)
    with hosted(engine.app) as upstream, hosted(create_app(settings_for(upstream.url, "monitor")), "on") as host:
        answer = Proxy(host).post(CHAT, chat_body())
        assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "unguarded")
        assert Proxy(host).sample("undertow_guard_failures_total", kind="no_handshake", mode="monitor") == 1


def test_ready_means_that_a_canary_was_scored(engine: FakeEngine, alone: Proxy) -> None:
    answer = alone.admin("/readyz")
    told = answer.json()["engines"]["main"]
    canary = told.pop("canary")
    assert (answer.status_code, answer.json()["ready"], told) == (
        200,
        True,
        {"ready": True, "checks": {"upstream": "ok", "guard": "ok", "canary": "ok"}, "reasons": {}},
    )
    assert (canary["reason"], canary["generation"]) == (None, 1)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(canary["at"])) < timedelta(seconds=30)
    assert 0 <= canary["seconds"] < 10  # to the millisecond


def test_a_canary_without_full_coverage_is_not_ready(engine: FakeEngine, alone: Proxy) -> None:
    engine.script = Script(fault="short")
    answer = alone.admin("/readyz")
    assert answer.status_code == 503
    told = answer.json()["engines"]["main"]
    assert "coverage" in told["reasons"]["canary"]
    assert told["canary"]["reason"] == told["reasons"]["canary"]


def test_healthz_needs_no_engine() -> None:
    with hosted(create_app(settings_for("http://127.0.0.1:9")), "on") as host:
        assert Proxy(host).get("/healthz").json() == {"status": "ok"}
        assert Proxy(host).get("/v1/models").json()["error"]["code"] == "upstream_unavailable"


def test_a_body_that_trickles_in_is_cut_off(enforce: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", enforce.host.port)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        client.settimeout(5)
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_many_requests_at_once_all_get_their_own_answer(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={0: 3}, token_delay_s=0.005)
    answers: list[httpx.Response] = []

    def ask(index: int) -> None:
        answers.append(enforce.post(CHAT, chat_body(stream=index % 2 == 0), {"x-request-id": f"r-{index}"}))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.headers["x-request-id"] for answer in answers} == {f"r-{index}" for index in range(24)}
    assert all(b"content_filter" in answer.content and b"PAYLOAD" not in answer.content for answer in answers)


def test_the_clients_key_is_replaced_where_the_settings_name_one(
    engine: FakeEngine, played: tuple[FakeEngine, Host]
) -> None:
    settings = settings_for(played[1].url, api_key_env="ENGINE_KEY")
    with hosted(create_app(settings, {"ENGINE_KEY": "engine-secret"}), "on") as host:
        Proxy(host).post(CHAT, chat_body())
        assert engine.headers[-1]["authorization"] == "Bearer engine-secret"
        assert KEY not in json.dumps(engine.headers)
