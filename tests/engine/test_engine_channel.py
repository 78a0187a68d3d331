"""Questions and answers over a real socket."""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import zmq

from guard.engine.channel import EvidenceClient, EvidenceServer
from guard.errors import EvidenceError
from guard.evidence import Evidence, Record


def about(key: str) -> Evidence:
    return Evidence(
        fingerprint=key,
        calibration="sha256:calibration",
        records=(Record(prompt_tokens=1, tokens_scored=1, mode="off", action="allow"),),
    )


@contextmanager
def serving(answer: Callable[[str], Evidence] = about) -> Iterator[EvidenceServer]:
    server = EvidenceServer(answer)
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def asking(address: str, timeout_s: float = 10.0) -> AsyncIterator[EvidenceClient]:
    client = EvidenceClient(address, timeout_s)
    try:
        yield client
    finally:
        client.close()


def folder(server: EvidenceServer) -> Path:
    return Path(server.address.removeprefix("ipc://")).parent


async def test_a_question_gets_its_answer() -> None:
    with serving() as server:
        async with asking(server.address) as client:
            assert await client.ask("one") == about("one")


async def test_many_questions_at_once_each_get_their_own_answer() -> None:
    def answer(key: str) -> Evidence:
        time.sleep(0.001 if int(key) % 7 == 0 else 0)
        return about(key)

    with serving(answer) as server:
        async with asking(server.address) as one, asking(server.address) as other:
            keys = [str(number) for number in range(200)]
            answers = await asyncio.gather(*(client.ask(key) for key in keys for client in (one, other)))
    assert [answer.fingerprint for answer in answers] == [key for key in keys for _ in range(2)]


async def test_a_dead_worker_is_an_error_in_time() -> None:
    with serving() as server:
        address = server.address
    async with asking(address, timeout_s=0.05) as client:
        with pytest.raises(EvidenceError, match=r"no evidence within 0\.05 s"):
            await client.ask("x")


async def test_a_dead_worker_is_an_error_in_time_for_however_many_ask() -> None:
    with serving() as server:
        address = server.address
    async with asking(address, timeout_s=0.5) as client:
        # More than zmq keeps for a peer that is not there.
        asks = asyncio.gather(*(client.ask("x") for _ in range(1500)), return_exceptions=True)
        answers = await asyncio.wait_for(asks, 15)
    assert {type(answer) for answer in answers} == {EvidenceError}


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    def answer(key: str) -> Evidence:
        if key == "slow":
            time.sleep(0.3)
        return about(key)

    with serving(answer) as server:
        async with asking(server.address, timeout_s=0.1) as hasty, asking(server.address) as patient:
            with pytest.raises(EvidenceError):
                await hasty.ask("slow")
            assert (await patient.ask("next")).fingerprint == "next"
            assert (await hasty.ask("own")).fingerprint == "own"


@pytest.mark.parametrize(
    "message",
    [
        [b"one frame"],
        [b"1", b"\xff\xfe"],
        [b"1", b"key", b"too many"],
        [b""],
        [b"1", b"breaks"],
        [b"1", b"big" * 99999],
    ],
    ids=["short", "not UTF-8", "long", "empty", "an answer that fails", "large"],
)
async def test_a_message_that_cannot_be_answered_leaves_the_next_one_its_answer(message: list[bytes]) -> None:
    def answer(key: str) -> Evidence:
        if key == "breaks":
            raise KeyError(key)
        return about(key)

    with serving(answer) as server, zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(server.address)
        socket.send_multipart(message)
        time.sleep(0.02)
        async with asking(server.address) as client:
            assert (await client.ask("one")).fingerprint == "one"
        socket.close(linger=0)


async def test_evidence_of_another_version_is_an_error() -> None:
    class Later(Evidence):
        def to_json(self) -> str:
            return super().to_json().replace('"version":1', '"version":2')

    with serving(lambda key: Later(fingerprint=key, calibration="sha256:calibration", records=())) as server:
        async with asking(server.address) as client:
            with pytest.raises(EvidenceError, match="version"):
                await client.ask("x")


def test_only_the_owner_can_reach_the_socket_and_closing_removes_it() -> None:
    with serving() as server:
        place = folder(server)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert (place / "evidence").is_socket()
    assert not place.exists()


def test_closing_ends_the_thread_every_time() -> None:
    """A zmq socket that another thread closes aborts the process now and then: this is how often it takes to see."""
    for _ in range(60):
        server = EvidenceServer(about)
        server.close()
        assert not server._thread.is_alive()


def test_closing_twice_is_no_trouble() -> None:
    with serving() as server:
        server.close()
