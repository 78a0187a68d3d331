"""Evidence in the responses of a small ASGI app, from a worker's real evidence channel."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from guard.control import RELOAD_PATH, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE
from guard.engine.channel import EvidenceClient, EvidenceServer
from guard.engine.middleware import EvidenceMiddleware
from guard.errors import ConfigError
from guard.evidence import (
    REQUEST_HEADER,
    SILENT,
    STATUS_AGE,
    STATUS_PATH,
    STREAM_PREFIX,
    DetectorStatus,
    Evidence,
    Record,
    Status,
    WorkerStatus,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORKER = WorkerStatus(
    rank=0,
    fingerprint="sha256:bank",
    calibration="sha256:calibration",
    generation=1,
    layers=(1, 4),
    reserved_token_id=5,
    detectors=(DetectorStatus(detectors=("density",), supported_fpr=0.01),),
    undertow_version="1",
    vllm_version="2",
    dtype="float32",
    requests_judged=3,
    tokens_scored=4,
    tokens_recalled=0,
    tokens_missed=0,
    unscorable=0,
)
CHUNKS = [
    b'data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"say \\"finish_reason\\":\\"stop\\""},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop","stop_reason":5}]}\n\n',
    b'data: {"choices":[],"usage":{}}\n\n',
    b"data: [DONE]\n\n",
]
FULL = b'{"choices": [{"finish_reason":"stop"}]}'


@dataclass
class Engine:
    """vLLM's API process as the middleware sees it, with a worker's channel behind it."""

    answer: Callable[[str], Evidence]
    workers: list[str] = field(default_factory=list)
    failure: Exception | None = None
    asked: int = 0
    request_ids: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.channel = EvidenceServer(self.answer)
        status = {"worker": WORKER.model_dump(mode="json"), "channel": self.channel.address}
        self.workers = [json.dumps(status)]
        routes = [Route(path, self.generate, methods=["GET", "POST"]) for path in (CHAT, TEXT, "/v1/models")]
        self.app = Starlette(routes=routes)
        self.app.state.engine_client = self
        self.guarded = EvidenceMiddleware(self.app)

    async def collective_rpc(self, method: str, timeout: float) -> list[str]:
        assert method == "undertow_status"
        assert timeout > 0
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return self.workers

    async def generate(self, request: Request) -> Response:
        self.request_ids.append(request.headers.getlist("x-request-id"))
        if "stream" not in request.query_params:
            status = int(request.query_params.get("status", 200))
            return Response(FULL, status_code=status, media_type="application/json", headers={"x-other": "kept"})

        async def chunks() -> AsyncIterator[bytes]:
            for chunk in CHUNKS:
                yield chunk

        return StreamingResponse(chunks(), media_type="text/event-stream")

    def close(self) -> None:
        if self.guarded._client is not None:
            self.guarded._client.close()
        self.channel.close()

    async def call(
        self, path: str, query: str = "", headers: dict[str, str] | None = None, method: str = "POST", raw: bool = False
    ) -> list[Message]:
        """One request through the middleware (`raw`: past it), and every message that came of it."""
        sent: list[Message] = []
        pairs = [(name.encode(), text.encode()) for name, text in (headers or {}).items()]
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": pairs,
            "app": self.app,
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await (self.app if raw else self.guarded)(scope, receive, send)
        # The headers as they came in are the caller's and stay so.
        assert pairs == [(name.encode(), text.encode()) for name, text in (headers or {}).items()]
        return sent


def known(key: str) -> Evidence:
    """Evidence that names the key it was asked for."""
    record = Record(prompt_tokens=3, tokens_scored=3, mode="enforce", action="allow", reason=key)
    return Evidence(fingerprint="sha256:bank", calibration="sha256:calibration", records=(record,))


def unknown(key: str) -> Evidence:
    return Evidence(fingerprint="sha256:bank", calibration="sha256:calibration", records=())


@pytest.fixture
def build() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(answer: Callable[[str], Evidence] = known) -> Engine:
        engines.append(Engine(answer))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


ASK = {REQUEST_HEADER: "1"}


def headers(messages: list[Message]) -> dict[str, str]:
    return {name.decode(): text.decode() for name, text in messages[0]["headers"]}


def bodies(messages: list[Message]) -> list[bytes]:
    return [message["body"] for message in messages[1:] if message["body"]]


def comments(messages: list[Message]) -> list[int]:
    """Where among the body messages evidence stands."""
    return [place for place, body in enumerate(bodies(messages)) if body.startswith(STREAM_PREFIX.encode())]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_full_response_carries_evidence_in_a_header_and_is_else_unchanged(
    build: Callable[..., Engine], path: str
) -> None:
    engine = build()
    plain, asked = await engine.call(path, raw=True), await engine.call(path, headers=ASK)
    evidence = Evidence.from_json(headers(asked)[REQUEST_HEADER])
    assert evidence == known(engine.request_ids[1][0])
    assert {name: text for name, text in headers(asked).items() if name != REQUEST_HEADER} == headers(plain)
    assert asked[1:] == plain[1:]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_carries_evidence_before_its_first_chunk_each_end_of_a_choice_and_done(
    build: Callable[..., Engine], path: str
) -> None:
    engine = build()
    plain = await engine.call(path, "stream", raw=True)
    asked = await engine.call(path, "stream", headers=ASK)
    assert comments(asked) == [0, 3, 6]
    parts = bodies(asked)
    for place in comments(asked):
        text = parts[place].decode()
        assert text.endswith("\n\n")
        assert Evidence.from_json(text.removeprefix(STREAM_PREFIX)) == known(engine.request_ids[1][0])
    assert [part for place, part in enumerate(parts) if place not in comments(asked)] == CHUNKS == bodies(plain)
    assert headers(asked) == headers(plain)
    assert [message.get("more_body") for message in asked[1:]] == [True] * 8 + [False]


@pytest.mark.parametrize("query", ["", "stream"])
async def test_nothing_is_added_where_evidence_is_not_asked_for(build: Callable[..., Engine], query: str) -> None:
    engine = build()
    given = {"x-request-id": "mine"}
    assert await engine.call(CHAT, query, given) == await engine.call(CHAT, query, given, raw=True)
    assert engine.request_ids == [["mine"], ["mine"]]
    assert engine.asked == 0


async def test_other_paths_are_left_alone(build: Callable[..., Engine]) -> None:
    engine = build()
    assert REQUEST_HEADER not in headers(await engine.call("/v1/models", headers=ASK, method="GET"))
    assert engine.asked == 0


@pytest.mark.parametrize("given", [{}, {"x-request-id": "0" * 32}, {"X-Request-ID": "chosen"}])
async def test_a_request_runs_under_an_id_that_no_client_chose(
    build: Callable[..., Engine], given: dict[str, str]
) -> None:
    engine = build()
    lower = {name.lower(): text for name, text in given.items()}
    for _ in range(3):
        await engine.call(CHAT, headers=ASK | lower)
    ids = [request_id for ids in engine.request_ids for request_id in ids]
    assert len(set(ids)) == len(ids) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert not set(ids) & set(given.values())


@pytest.mark.parametrize("query", ["", "stream"])
async def test_a_worker_that_knows_nothing_leaves_the_response_without_evidence(
    build: Callable[..., Engine], query: str
) -> None:
    engine = build(unknown)
    assert await engine.call(CHAT, query, ASK) == await engine.call(CHAT, query, raw=True)


@pytest.mark.parametrize("query", ["", "stream"])
async def test_a_worker_that_does_not_answer_is_called_silent_in_the_place_of_evidence(
    build: Callable[..., Engine], query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.engine.middleware.EvidenceClient", partial(EvidenceClient, timeout_s=0.05))
    engine = build()
    await engine.call(CHAT, headers=ASK)
    engine.channel.close()
    asked = await engine.call(CHAT, query, ASK)
    if query:
        silent = f"{STREAM_PREFIX}{SILENT}\n\n".encode()
        # Where evidence stands: before the first chunk, before the one that ends a choice, and before the end.
        assert bodies(asked) == [silent, *CHUNKS[:2], silent, *CHUNKS[2:4], silent, *CHUNKS[4:]]
    else:
        assert headers(asked)[REQUEST_HEADER] == SILENT
        assert bodies(asked) == bodies(await engine.call(CHAT, query, raw=True))


async def test_the_status_says_whether_the_worker_gives_evidence(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.engine.middleware.PING_TIMEOUT_S", 0.05)
    engine = build()
    for closed, told in ((False, "answers"), (True, "silent")):
        if closed:
            engine.channel.close()
        answer = bodies(await engine.call(STATUS_PATH, method="GET"))[0]
        assert Status.from_json(answer).channel == told
        assert Status.from_json(answer).workers == (WORKER,)


async def test_a_status_that_may_be_old_lets_the_workers_sleep(build: Callable[..., Engine]) -> None:
    engine = build(guarded_by())
    first = bodies(await engine.call(STATUS_PATH, method="GET"))
    asked = engine.asked
    assert bodies(await engine.call(STATUS_PATH, f"{STATUS_AGE}=20", method="GET")) == first
    assert engine.asked == asked
    for query in ("", f"{STATUS_AGE}=0", f"{STATUS_AGE}=-1", f"{STATUS_AGE}=x"):
        await engine.call(STATUS_PATH, query, method="GET")
        assert engine.asked > asked
        asked = engine.asked


@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_a_status_is_asked_for_anew_when_the_engine_had_something_to_do(
    build: Callable[..., Engine], path: str
) -> None:
    engine = build(guarded_by())
    await engine.call(STATUS_PATH, method="GET")
    asked = engine.asked
    await engine.call(path, headers=ASK)
    await engine.call(STATUS_PATH, f"{STATUS_AGE}=20", method="GET")
    assert engine.asked == asked + 1


async def test_a_status_of_a_busy_engine_is_always_fresh(build: Callable[..., Engine]) -> None:
    engine = build(guarded_by())
    engine.guarded._app = waits = Waits()
    running = asyncio.create_task(engine.call("/v1/other"))
    await waits.begun.wait()
    for asked in (1, 2, 3):
        await engine.call(STATUS_PATH, f"{STATUS_AGE}=20", method="GET")
        assert engine.asked == asked + 1  # the first also opens the channel
    waits.end.set()
    await running


class Waits:
    """An app that answers when it is told to."""

    def __init__(self) -> None:
        self.begun, self.end = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.set()
        await self.end.wait()


async def test_a_status_is_asked_for_anew_when_it_has_aged(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("guard.engine.middleware.monotonic", lambda: now)
    engine = build(guarded_by())
    await engine.call(STATUS_PATH, method="GET")
    now, asked = 120.5, engine.asked
    await engine.call(STATUS_PATH, f"{STATUS_AGE}=20", method="GET")
    assert engine.asked == asked + 1


@pytest.mark.parametrize("calibration", ["sha256:another", "dead"])
async def test_an_old_status_is_not_told_of_another_guard_or_a_dead_one(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, calibration: str
) -> None:
    monkeypatch.setattr("guard.engine.middleware.PING_TIMEOUT_S", 0.05)
    engine = build(guarded_by(calibration))
    if calibration == "dead":
        engine.channel.close()
    await engine.call(STATUS_PATH, method="GET")
    asked = engine.asked
    await engine.call(STATUS_PATH, f"{STATUS_AGE}=20", method="GET")
    assert engine.asked > asked


def guarded_by(calibration: str = WORKER.calibration or "") -> Callable[[str], Evidence]:
    return lambda _: Evidence(fingerprint=WORKER.fingerprint or "", calibration=calibration, records=())


async def test_an_error_response_carries_what_is_known(build: Callable[..., Engine]) -> None:
    asked = await build().call(CHAT, "status=400", ASK)
    assert asked[0]["status"] == 400
    assert REQUEST_HEADER in headers(asked)


async def test_the_channel_is_opened_once(build: Callable[..., Engine]) -> None:
    engine = build()
    for _ in range(3):
        await engine.call(CHAT, headers=ASK)
    assert engine.asked == 1


def no_workers(engine: Engine) -> None:
    engine.workers = []


def fails(engine: Engine) -> None:
    engine.failure = TimeoutError("canary")


def not_json(engine: Engine) -> None:
    engine.workers = ["canary"]


def nothing_known(engine: Engine) -> None:
    engine.workers = ["{}"]


def no_engine(engine: Engine) -> None:
    del engine.app.state.engine_client


@pytest.mark.parametrize("broken", [no_workers, fails, not_json, nothing_known, no_engine])
@pytest.mark.parametrize("query", ["", "stream"])
async def test_nothing_is_generated_where_the_channel_cannot_be_had(
    build: Callable[..., Engine], broken: Callable[[Engine], None], query: str
) -> None:
    engine = build()
    broken(engine)
    answer = await engine.call(CHAT, query, ASK)
    assert answer[0]["status"] == 503
    error = json.loads(b"".join(bodies(answer)))["error"]
    assert error["code"] == "guard_unavailable"
    assert "canary" not in str(error)
    assert engine.request_ids == []


async def test_a_guard_that_comes_back_serves_again(build: Callable[..., Engine]) -> None:
    engine = build()
    fails(engine)
    assert (await engine.call(CHAT, headers=ASK))[0]["status"] == 503
    engine.failure = None
    assert REQUEST_HEADER in headers(await engine.call(CHAT, headers=ASK))


def second_rank(channel: str | None) -> str:
    return json.dumps({"worker": WORKER.model_copy(update={"rank": 1}).model_dump(mode="json"), "channel": channel})


@pytest.mark.parametrize("place", [0, 1])
async def test_evidence_comes_from_the_rank_that_has_the_channel(build: Callable[..., Engine], place: int) -> None:
    engine = build()
    engine.workers.insert(place, second_rank(None))
    assert REQUEST_HEADER in headers(await engine.call(CHAT, headers=ASK))


@pytest.mark.parametrize("channel", ["ipc://x", None])
async def test_without_one_rank_that_speaks_for_all_nothing_is_generated(
    build: Callable[..., Engine], channel: str | None
) -> None:
    engine = build()
    engine.workers = [second_rank(channel), second_rank(channel)]
    assert (await engine.call(CHAT, headers=ASK))[0]["status"] == 503
    assert engine.request_ids == []


async def test_the_status_names_every_worker(build: Callable[..., Engine]) -> None:
    engine = build()
    engine.workers.append(second_rank("ipc://x"))
    answer = await engine.call(STATUS_PATH, method="GET")
    assert answer[0]["status"] == 200
    status = Status.from_json(b"".join(bodies(answer)))
    assert status.workers == (WORKER, WORKER.model_copy(update={"rank": 1}))
    assert status.channel == "silent", "two ranks that would speak are none"
    assert b"ipc://" not in b"".join(bodies(answer))


@pytest.mark.parametrize("broken", [fails, not_json, nothing_known, no_engine])
async def test_a_status_that_cannot_be_had_is_an_error(
    build: Callable[..., Engine], broken: Callable[[Engine], None]
) -> None:
    engine = build()
    broken(engine)
    answer = await engine.call(STATUS_PATH, method="GET")
    assert answer[0]["status"] == 503
    assert b"canary" not in b"".join(bodies(answer))


async def test_a_status_is_read_and_not_written(build: Callable[..., Engine]) -> None:
    answer = await build().call(STATUS_PATH, method="POST")
    assert answer[0]["status"] in (404, 405)


async def test_without_a_token_nothing_can_be_changed(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(TOKEN_FILE_VARIABLE, raising=False)
    engine = build()
    for given in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}):
        assert (await engine.call(RELOAD_PATH, headers=given))[0]["status"] == 404
    assert engine.asked == 0


async def test_with_a_token_the_endpoint_is_there_for_whoever_has_it(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-some-length")
    engine = build()
    assert (await engine.call(RELOAD_PATH))[0]["status"] == 401
    known = {"authorization": "Bearer a-token-of-some-length"}
    assert (await engine.call(RELOAD_PATH, headers=known))[0]["status"] == 400
    assert (await engine.call(RELOAD_PATH, headers=known, method="GET"))[0]["status"] == 404


def test_an_engine_whose_token_cannot_be_used_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        EvidenceMiddleware(Starlette())


async def test_an_app_that_fails_before_its_first_byte_sends_none(build: Callable[..., Engine]) -> None:
    engine = build()

    async def fail(request: Request) -> JSONResponse:
        raise RuntimeError("inside")

    engine.app.router.routes = [Route(CHAT, fail, methods=["POST"])]
    with pytest.raises(RuntimeError, match="inside"):
        await engine.call(CHAT, headers=ASK)
