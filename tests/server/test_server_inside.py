"""Faults of our own, and answers of an engine that lies: in `enforce` nothing of them passes, and each is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, NoReturn

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from guard.evidence import STATUS_PATH, Evidence
from guard.policy import Mode, Policy
from server.app import create_app
from server.assessment import Assessor
from server.config.settings import Settings
from server.drain import Drain
from server.errors import ApiError, ShuttingDown
from server.protocols.openai import CHAT as CHAT_ENDPOINT
from server.protocols.openai import Call, read_call
from server.ruling import Ruling
from server.whole import judge_answer

from .conftest import Proxy, settings_for
from .fake_engine import FakeEngine, Play, Script, status
from .hosting import Host, hosted
from .test_server_answers import CHAT, chat_body, events
from .test_server_failures import error_code, eventually
from .test_server_stream import HANDSHAKE, comment, data, opened

SECRET = "what-the-fault-holds"


def broken(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(SECRET)


@pytest.fixture
def inside(alone: Proxy, caplog: pytest.LogCaptureFixture) -> Iterator[Proxy]:
    """Of this test only: it counts one fault, which the log tells whole."""
    yield alone
    assert alone.sample("undertow_guard_failures_total", kind="internal", mode="enforce") == 1
    assert any(each.message == "fault" and each.exc_info for each in caplog.get_records("call"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_before_the_answer_is_a_503(inside: Proxy, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("server.exchange.judge_answer", broken)
    monkeypatch.setattr("server.exchange.evidence_of", broken)
    answer = inside.post(CHAT, chat_body(stream=stream))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")
    assert SECRET not in answer.text


def test_a_fault_in_the_middle_ends_the_stream_as_clients_read_it(
    inside: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.stream import StreamGuard

    feed = StreamGuard.feed
    fed = 0

    def feed_twice(self: StreamGuard, event: Any) -> list[bytes]:
        nonlocal fed
        fed += 1
        return feed(self, event) if fed < 4 else broken()

    monkeypatch.setattr(StreamGuard, "feed", feed_twice)
    answer = inside.post(CHAT, chat_body(stream=True))
    *_, error, done = events(answer.content)
    assert (error_code(error), done) == ("guard_unavailable", b"data: [DONE]\n\n")
    assert SECRET not in answer.text


def test_a_fault_outside_of_completions_is_a_500_without_its_text(
    alone: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.routes.list_models", broken)
    answer = alone.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert SECRET not in answer.text


def test_a_fault_where_nothing_is_judged_is_a_500_without_its_text(
    engine: FakeEngine, played: tuple[FakeEngine, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = settings_for(played[1].url).model_dump(exclude_unset=True)
    settings = Settings.model_validate({**fields, "endpoints": {"unguarded": ["tokenize"]}})
    monkeypatch.setattr("server.passing.Question", broken)
    with hosted(create_app(settings), "on") as host:
        answer = Proxy(host).post("/tokenize", {"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert SECRET not in answer.text


def test_work_that_begins_after_the_end_is_not_begun() -> None:
    async def never() -> None:
        raise AssertionError("it was begun")

    async def late() -> None:
        drain = Drain()
        drain.cut()
        with pytest.raises(ShuttingDown):
            await drain.bounded(never())

    asyncio.run(late())


# An engine that lies


def judged(change: Any, mode: Mode = "enforce", script: Script | None = None) -> tuple[bytes | ApiError, Assessor]:
    """A whole answer of which `change` changed the body and the evidence."""
    asked = {"messages": [], "n": 2}
    call: Call = read_call(CHAT_ENDPOINT, json.dumps(asked).encode())
    policy = Policy(mode=mode)
    play = Play(script or Script(), json.loads(call.upstream_body(policy, None)), chat=True)
    body, evidence = json.loads(play.full()), json.loads(play.evidence(final=True) or "")
    change(body, evidence)
    assessor = Assessor(call, Ruling(policy), HANDSHAKE)
    text = json.dumps(evidence).encode()
    assert Evidence.from_json(text)
    return judge_answer(call, assessor, text, json.dumps(body).encode()), assessor


def no_choices(body: dict[str, Any], _: Any) -> None:
    del body["choices"]


def one_too_few(body: dict[str, Any], _: Any) -> None:
    del body["choices"][1]


def twice_the_same(body: dict[str, Any], _: Any) -> None:
    body["choices"][1]["index"] = 0


def one_record_twice(_: Any, evidence: dict[str, Any]) -> None:
    evidence["records"][1]["choice_index"] = 0


def a_record_of_nobody(_: Any, evidence: dict[str, Any]) -> None:
    evidence["records"][1]["choice_index"] = 7


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (no_choices, "response_invalid"),
        (one_too_few, "response_invalid"),
        (twice_the_same, "response_invalid"),
        (one_record_twice, "evidence_invalid"),
        (a_record_of_nobody, "evidence_invalid"),
    ],
)
def test_an_answer_that_does_not_fit_its_evidence_is_not_released(change: Any, kind: str) -> None:
    released, assessor = judged(change)
    assert isinstance(released, ApiError)
    assert released.code == "guard_unavailable"
    assert assessor.failure is not None
    assert assessor.failure.kind == kind


def test_where_all_is_blocked_coverage_is_not_asked_for() -> None:
    def unscored(_: Any, evidence: dict[str, Any]) -> None:
        for record in evidence["records"]:
            record["tokens_scored"] = 1

    released, assessor = judged(unscored, script=Script(blocked={0: 1, 1: 1}))
    assert assessor.failure is None
    assert isinstance(released, bytes)
    assert [choice["finish_reason"] for choice in json.loads(released)["choices"]] == ["content_filter"] * 2


def test_evidence_that_fails_in_the_middle_of_a_stream_ends_it() -> None:
    call = read_call(CHAT_ENDPOINT, b'{"messages": [], "stream": true}')
    play = Play(Script(), json.loads(call.upstream_body(Policy(), None)), chat=True)
    guard, assessor = opened(call)
    guard.feed(comment(play.evidence(final=False)))
    assert guard.opened
    first, *_ = play.data_events()
    guard.feed(data(first))
    *_, error, done = guard.feed(comment('{"version": 1}'))
    assert (error_code(error), done) == ("guard_unavailable", b"data: [DONE]\n\n")
    assert assessor.failure is not None
    assert guard.closed


def test_an_error_of_the_engine_beside_a_sequence_that_could_not_be_scored_is_the_guards() -> None:
    call = read_call(CHAT_ENDPOINT, b'{"messages": [], "stream": true}')
    asked = json.loads(call.upstream_body(Policy(), None))
    guard, assessor = opened(call)
    guard.feed(comment(Play(Script(), asked, chat=True).evidence(final=False)))
    failed = Play(Script(fault="not_finite"), asked, chat=True).evidence(final=True)
    guard.feed(data(b'data: {"error": {"message": "no", "code": 500}}\n\n'))
    # Evidence that came before the error was read, and says why.
    guard._evidence = (failed or "").encode()
    error, done = guard.feed(data(b"data: [DONE]\n\n"))
    assert (error_code(error), done) == ("guard_unavailable", b"data: [DONE]\n\n")
    assert assessor.failure is not None
    assert assessor.failure.kind == "not_finite"


# An engine that is none


@pytest.mark.parametrize(
    ("code", "hint"), [(404, "is Undertow's middleware loaded"), (500, "its workers gave no status")]
)
def test_an_engine_without_the_guard_is_told_from_one_whose_workers_are_silent(code: int, hint: str) -> None:
    async def answer(_: Request) -> Response:
        return JSONResponse({}, code)

    with hosted(Starlette(routes=[Route(STATUS_PATH, answer)])) as host:
        told = readiness(host.url)
    assert hint in told["engines"]["main"]["reasons"]["guard"]


@pytest.mark.parametrize(
    ("code", "body", "hint"),
    [
        (401, b"{}", "must name its key"),
        (500, b"{}", "the engine answered 500"),
        (200, b"<html>", "evidence_missing"),
        (200, b"[]", "evidence_missing"),
    ],
)
def test_a_canary_that_is_not_answered_says_why(code: int, body: bytes, hint: str) -> None:
    async def answer(_: Request) -> Response:
        return Response(body, code, media_type="application/json")

    async def tell(_: Request) -> Response:
        return Response(status().model_dump_json(), media_type="application/json")

    routes = [Route(STATUS_PATH, tell), Route("/v1/completions", answer, methods=["POST"]), Route("/v1/models", answer)]
    with hosted(Starlette(routes=routes)) as host:
        told = readiness(host.url)
    assert hint in told["engines"]["main"]["reasons"]["canary"]


def readiness(engine: str) -> dict[str, Any]:
    """What operators are told of a server before this engine."""
    with hosted(create_app(settings_for(engine)), "on") as host:
        answer = httpx.get(f"{host.admin_url}/readyz", timeout=15)
    assert answer.status_code == 503
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("listing", [b"<html>", b"[]", b'{"data": 3}', b'{"data": [{"id": 3}]}', b'{"data": {}}'])
def test_a_list_of_models_that_is_none_is_as_good_as_no_list(listing: bytes) -> None:
    from server.upstreams.engine import model_entries

    assert not model_entries(listing)


def test_a_watch_that_fails_is_begun_again(
    played: tuple[FakeEngine, Host], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.upstreams.handshake import HandshakeKeeper

    watch, failed = HandshakeKeeper.watch, False

    async def once_broken(self: HandshakeKeeper) -> None:
        nonlocal failed
        if not failed:
            failed = True
            broken()
        await watch(self)

    monkeypatch.setattr(HandshakeKeeper, "watch", once_broken)
    monkeypatch.setattr("server.upstreams.engine._AGAIN_S", 0.05)
    with hosted(create_app(settings_for(played[1].url)), "on") as host:
        proxy = Proxy(host)
        assert failed
        assert proxy.post(CHAT, chat_body()).status_code == 200
        # Another status is found by the watch alone.
        engine.status = status(fingerprint="d" * 16)
        try:
            found = eventually(lambda: f'fingerprint="{"d" * 16}"' in proxy.admin("/metrics").text, within_s=10)
        finally:
            engine.status = status()
    assert found


def test_a_stream_that_breaks_before_its_first_event_is_no_stream(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(cut_after=0, fault="missing")
    answer = enforce.post(CHAT, chat_body(stream=True))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")


def test_a_stream_without_any_event_is_no_stream() -> None:
    async def nothing(_: Request) -> Response:
        return Response(b"", media_type="text/event-stream")

    async def tell(_: Request) -> Response:
        return Response(status().model_dump_json(), media_type="application/json")

    routes = [Route(STATUS_PATH, tell), Route(CHAT, nothing, methods=["POST"])]
    with hosted(Starlette(routes=routes)) as host, hosted(create_app(settings_for(host.url)), "on") as server:
        answer = Proxy(server).post(CHAT, chat_body(stream=True))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
