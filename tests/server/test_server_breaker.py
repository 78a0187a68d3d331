"""When an engine that fails is left alone, and who waits for room in what order."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from server.errors import UpstreamError
from server.upstreams.breaker import FAILURES, Breaker
from server.upstreams.queue import Queue


def opened() -> Breaker:
    breaker = Breaker()
    assert [breaker.failed() for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES - 1):
            assert not breaker.failed()
        breaker.succeeded()
    assert not breaker.open
    assert opened().open


def test_a_request_that_began_before_does_not_close_it_and_a_probe_does() -> None:
    breaker = opened()
    breaker.succeeded()
    assert breaker.open
    assert breaker.probed(False) is not None
    assert breaker.open
    assert breaker.probed(True) is None
    assert not breaker.open
    assert not breaker.failed(), "it counts from the start again"


def test_probes_that_fail_come_less_and_less_often() -> None:
    breaker = opened()
    assert [breaker.probed(False) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    breaker.probed(True)
    assert breaker.probed(False) == 1


def test_it_opens_once() -> None:
    assert not opened().failed()


class Rooms:
    """A queue, and the room that nobody took."""

    def __init__(self, most: int = 9) -> None:
        self.back: list[str] = []
        self.queue = Queue(most, self.back.append)

    def wait(self, *engines: str, seconds: float = 5) -> asyncio.Task[str | None]:
        return asyncio.ensure_future(self.queue.wait(engines, monotonic() + seconds))


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_room_goes_to_the_first_that_may_use_it() -> None:
    async def play() -> None:
        rooms = Rooms()
        first, second, third = rooms.wait("a"), rooms.wait("b"), rooms.wait("a", "b")
        await _settle()
        assert rooms.queue.hand_on("b")
        assert rooms.queue.hand_on("b")
        await _settle()
        assert (first.done(), await second, await third) == (False, "b", "b")
        assert not rooms.queue.hand_on("b")
        assert rooms.queue.hand_on("a")
        assert await first == "a"
        assert len(rooms.queue) == 0

    asyncio.run(play())


def test_who_waits_too_long_or_behind_too_many_is_told_that_all_are_busy() -> None:
    async def play() -> None:
        rooms = Rooms(most=1)
        late = rooms.wait("a", seconds=0.02)
        await _settle()
        for refused in (rooms.wait("a"), rooms.wait("a", seconds=0), late):
            with pytest.raises(UpstreamError) as caught:
                await refused
            assert caught.value.kind == "busy"
        assert len(rooms.queue) == 0

    asyncio.run(play())


def test_room_that_was_handed_to_one_that_left_in_the_same_moment_is_given_back() -> None:
    async def play() -> None:
        rooms = Rooms()
        leaving = rooms.wait("a")
        await _settle()
        assert rooms.queue.hand_on("a")
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert rooms.back == ["a"]

    asyncio.run(play())


def test_who_leaves_the_queue_is_handed_nothing() -> None:
    async def play() -> None:
        rooms = Rooms()
        leaving = rooms.wait("a")
        await _settle()
        leaving.cancel()
        await asyncio.wait((leaving,))
        assert not rooms.queue.hand_on("a")
        assert rooms.back == []

    asyncio.run(play())


def test_where_engines_came_or_went_all_look_again() -> None:
    async def play() -> None:
        rooms = Rooms()
        waiting = [rooms.wait("a"), rooms.wait("b")]
        await _settle()
        rooms.queue.wake_all()
        assert await asyncio.gather(*waiting) == [None, None]

    asyncio.run(play())
