"""All workers take what is wanted, or none does, and serving goes on: the two phases, without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from guard.control import Loaded, Wanted
from guard.engine.handover import Handover
from guard.engine.reload import RefusedError, ReloadEndpoint, Reloader
from guard.errors import BankError, EngineError

OLD = Wanted(fingerprint="sha256:" + "0" * 64, calibration="sha256:" + "1" * 64)
NEW = Wanted(fingerprint="sha256:" + "0" * 64, calibration="sha256:" + "2" * 64)
TOKEN = "a token of some length"


@dataclass
class Worker:
    """One worker's half, as `worker.py` wires it."""

    guards: Wanted = OLD
    generation: int = 1
    refuses: Exception | None = None

    def __post_init__(self) -> None:
        self.handover: Handover[Wanted] = Handover(self.read, self.take, lambda: self.generation)

    def read(self, wanted: Wanted) -> Wanted | None:
        if self.refuses is not None:
            raise self.refuses
        return None if wanted == self.guards else wanted

    def take(self, wanted: Wanted) -> None:
        self.guards, self.generation = wanted, self.generation + 1


@dataclass
class Engine:
    """vLLM's API process as the reload sees it: what it was asked, in order."""

    workers: list[Worker] = field(default_factory=lambda: [Worker(), Worker()])
    asked: list[str] = field(default_factory=list)
    fails: str | None = None
    paused: bool = False
    meanwhile: Callable[[], None] = lambda: None

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        name = method.removeprefix("undertow_")
        self.asked.append(name)
        if self.fails == name:
            raise TimeoutError(name)
        answers = [getattr(worker.handover, name)(*args) for worker in self.workers]
        if name == "prepare":
            self.meanwhile()
        await asyncio.sleep(0)
        return answers

    async def is_paused(self) -> bool:
        return self.paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.asked.append("pause")
        self.paused = True

    async def resume_generation(self) -> None:
        self.asked.append("resume")
        self.paused = False

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        assert self.paused, "a step could be computed between the change and this"
        assert reset_running_requests, "without it vLLM resets nothing while requests run"
        self.asked.append("reset")
        if self.fails == "reset":
            raise RuntimeError("reset")
        return True


def load(engine: Engine, wanted: Wanted = NEW) -> Loaded:
    return asyncio.run(Reloader().load(engine, wanted))


def test_every_worker_takes_it_while_no_step_is_computed_and_the_cache_is_emptied_before_one_is() -> None:
    engine = Engine()
    loaded = load(engine)
    assert engine.asked == ["prepare", "pause", "commit", "reset", "resume"]
    assert [worker.guards for worker in engine.workers] == [NEW, NEW]
    assert (loaded.generation, loaded.changed, loaded.workers, loaded.calibration) == (2, True, 2, NEW.calibration)


@pytest.mark.parametrize("refuses", [BankError("bank: of another model"), RuntimeError("no memory")])
@pytest.mark.parametrize("who", [0, 1])
def test_one_refusal_leaves_every_worker_with_what_it_has(refuses: Exception, who: int) -> None:
    engine = Engine()
    engine.workers[who].refuses = refuses
    with pytest.raises(RefusedError, match=str(refuses)):
        load(engine)
    assert engine.asked == ["prepare", "abandon"]
    assert [(worker.guards, worker.generation) for worker in engine.workers] == [(OLD, 1)] * 2
    # And nothing that was prepared lies about.
    assert all(worker.handover._prepared is None for worker in engine.workers)
    engine.workers[who].refuses = None
    assert load(engine).generation == 2


def test_workers_that_do_not_answer_are_not_asked_to_commit() -> None:
    engine = Engine(fails="prepare")
    with pytest.raises(EngineError, match="undertow_prepare: the workers gave no answer: TimeoutError"):
        load(engine)
    assert engine.asked == ["prepare", "abandon"]
    assert [worker.guards for worker in engine.workers] == [OLD, OLD]


@pytest.mark.parametrize("fails", ["commit", "reset"])
def test_an_engine_is_resumed_and_its_cache_emptied_whatever_fails(fails: str) -> None:
    engine = Engine(fails=fails)
    with pytest.raises((EngineError, RuntimeError)):
        load(engine)
    assert engine.asked == ["prepare", "pause", "commit", "reset", "resume"]
    assert not engine.paused


def test_an_engine_that_somebody_else_paused_stays_paused() -> None:
    engine = Engine(paused=True)
    assert load(engine).changed
    assert engine.asked == ["prepare", "commit", "reset"]
    assert engine.paused


def test_what_guards_already_is_not_loaded_again() -> None:
    engine = Engine()
    loaded = load(engine, OLD)
    assert (loaded.changed, loaded.generation) == (False, 1)
    assert engine.asked == ["prepare"]


def test_a_change_that_another_one_came_between_is_refused_by_all() -> None:
    """Two API processes of one engine, each with a lock of its own."""
    engine = Engine()

    def other() -> None:
        for worker in engine.workers:
            worker.handover.prepare("another ticket", NEW.model_dump_json())

    engine.meanwhile = other
    with pytest.raises(EngineError, match="nothing was prepared for this change, or another one came between"):
        load(engine)
    assert [worker.guards for worker in engine.workers] == [OLD, OLD]


def test_what_was_prepared_is_gone_with_the_next_change_even_if_that_is_refused() -> None:
    worker = Worker()
    worker.handover.prepare("first", NEW.model_dump_json())
    worker.refuses = BankError("another")
    worker.handover.prepare("second", NEW.model_dump_json())
    assert json.loads(worker.handover.commit("first"))["refusal"] is not None
    assert worker.guards == OLD


def test_workers_that_count_differently_are_told_of() -> None:
    engine = Engine()
    engine.workers[1].generation = 4
    with pytest.raises(EngineError, match=r"do not agree on the generation, and have to be restarted: \[2, 5\]"):
        load(engine)


async def test_changes_of_one_process_wait_for_each_other() -> None:
    engine, reloader = Engine(), Reloader()
    loaded = await asyncio.gather(*(reloader.load(engine, wanted) for wanted in (NEW, OLD, NEW)))
    assert [each.generation for each in loaded] == [2, 3, 4]
    assert engine.asked == ["prepare", "pause", "commit", "reset", "resume"] * 3


# -- the endpoint -----------------------------------------------------------------------------------------------------


async def posted(engine: Engine, body: bytes, authorization: str | None = f"Bearer {TOKEN}") -> tuple[int, Any]:
    sent: list[Message] = []
    headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]

    class App:
        class state:  # noqa: N801
            engine_client = engine

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/undertow/reload", "headers": headers, "app": App}
    await ReloadEndpoint(TOKEN.encode())(scope, receive, send)
    assert Request(scope).method == "POST"
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_whoever_has_the_token_changes_the_engine() -> None:
    engine = Engine()
    status, answer = await posted(engine, NEW.model_dump_json().encode())
    assert status == 200
    assert Loaded.model_validate(answer).generation == 2


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer ", "Bearer wrong", f"Bearer {TOKEN} ", f"Bearer {TOKEN[:-1]}", "Bearer \xff"]
)
async def test_nobody_else_does_and_nothing_is_read_of_what_they_send(authorization: str | None) -> None:
    engine = Engine()
    status, answer = await posted(engine, b"not JSON", authorization)
    assert (status, engine.asked) == (401, [])
    assert TOKEN not in str(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"fingerprint": "/etc/passwd", "calibration": "x"}',
        b"x" * 10**6,
        json.dumps({**NEW.model_dump(), "path": "/tmp/canary"}).encode(),
    ],
)
async def test_a_request_that_is_none_changes_nothing_and_is_not_repeated(body: bytes) -> None:
    engine = Engine()
    status, answer = await posted(engine, body)
    assert (status, engine.asked) == (400, [])
    assert "passwd" not in str(answer)
    assert "canary" not in str(answer)


async def test_a_refusal_is_told_with_its_reason() -> None:
    engine = Engine()
    engine.workers[1].refuses = BankError("tuned.bank: layer 3 has 4 directions, expected 8")
    status, answer = await posted(engine, NEW.model_dump_json().encode())
    assert (status, answer) == (409, {"error": "tuned.bank: layer 3 has 4 directions, expected 8"})


async def test_a_change_is_made_to_its_end_though_the_client_leaves() -> None:
    engine = Engine()
    call = asyncio.ensure_future(posted(engine, NEW.model_dump_json().encode()))
    while not engine.asked:
        await asyncio.sleep(0)
    call.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.asked == ["prepare", "pause", "commit", "reset", "resume"]
    assert [worker.guards for worker in engine.workers] == [NEW, NEW]
