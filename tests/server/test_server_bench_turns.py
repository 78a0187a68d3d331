"""What `undertow bench server` makes of what it hears: planted answers, found again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from server.benching.bench import FLOOD, Plan, measure
from server.benching.client import Clients, Heard, Question, disorder
from server.benching.comparison import Cost, Taken, costs, rows
from server.benching.memory import growth
from server.benching.report import Found, Goal
from server.benching.soak import Booked, Soaked, incidents, soak_rate
from server.benching.stage import Stage, Target
from server.benching.turns import LIMIT, Flood, Kept, Outcome, Tally, Times, Turn

MS = 1_000_000
STREAM = Question(tokens=4, interval_s=0.02, stream=True)
TURN = Turn("t", seconds=50, rate=40, streams=0.5, tokens=8, interval_s=0.02, seed=3, blocked=0.2)


def heard(question: Question = STREAM, tokens: list[tuple[int, int, int]] | None = None, **fields: object) -> Heard:
    """A stream of four tokens that came in order: sent 10 ms apart, each 2 ms on its way; asked 1 ms before."""
    plain = [(number, (11 + 10 * number) * MS, (13 + 10 * number) * MS) for number in range(4)]
    answer = Heard(question, asked=0, ended=50 * MS, status=200, received=1 * MS, done=question.stream)
    answer.tokens = plain if tokens is None else tokens
    for name, value in fields.items():
        setattr(answer, name, value)
    return answer


@pytest.mark.parametrize(
    ("numbers", "lost"),
    [
        ([0, 1, 2, 3], 0),
        ([0, 1, 3], 1),
        ([], 4),
        ([0, 1, 1, 2, 3], 1),
        ([0, 2, 1, 3], 1),
        ([0, 1, 2, 3, 4], 1),
        ([3], 3),
    ],
)
def test_frames_that_are_missing_doubled_or_out_of_order_are_lost(numbers: list[int], lost: int) -> None:
    assert disorder(numbers, 4) == lost
    tally = Tally(0)
    tally.add(heard(tokens=[(number, 1, 1) for number in numbers]))
    assert tally.close().lost == lost


def test_times_are_without_what_the_engine_took() -> None:
    tally = Tally(0)
    tally.add(heard())
    whole = Question(tokens=1, interval_s=0.02, stream=False)
    tally.add(heard(whole, tokens=[(0, 21 * MS, 23 * MS)], ended=24 * MS))
    times = tally.close().times
    assert times["first token"] == Times(1, 0.003, 0.003)
    assert times["between tokens"].p50 == times["between tokens"].p99 == pytest.approx(0)
    assert times["request"] == Times(1, 0.004, 0.004)


def test_a_token_that_is_held_back_is_measured_from_the_one_that_frees_it() -> None:
    late = [(number, (11 + 10 * number) * MS, (22 + 10 * number) * MS) for number in range(4)]
    tally = Tally(1)
    tally.add(heard(tokens=late))
    times = tally.close().times
    assert times["first token"].p50 == pytest.approx(0.012)
    assert times["first token released"].p50 == pytest.approx(0.002)
    assert times["between tokens"].count == 2


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"leaked": True}, "payload reached the client"),
        ({"status": 503}, "status 503"),
        ({"status": 0, "ended": 0}, "no answer"),
        ({"ended": 0}, "no end"),
        ({"filtered": True}, "blocked"),
        ({"done": False}, "no [DONE]"),
    ],
)
def test_an_answer_that_is_not_what_it_should_be_has_failed_and_says_how(fields: dict[str, object], how: str) -> None:
    tally = Tally(0)
    tally.add(heard(**fields))
    outcome = tally.close()
    assert (outcome.answers, outcome.failed, outcome.failures, outcome.times) == (0, 1, {how: 1}, {})


def test_an_answer_that_should_have_been_blocked_and_was_not_has_failed() -> None:
    asked = Question(tokens=4, interval_s=0.02, stream=True, blocked=True, id="b")
    tally = Tally(0)
    tally.add(heard(asked))
    tally.add(heard(asked, tokens=[(0, 1, 1), (1, 2, 2)], filtered=True))
    outcome = tally.close()
    assert (outcome.failures, outcome.blocked, outcome.lost) == ({"not blocked": 1}, ["b"], 0)


def test_the_same_seed_asks_the_same_at_the_same_moments_and_at_the_rate() -> None:
    first, again = list(TURN.schedule()), list(TURN.schedule())
    assert first == again
    assert len(first) == pytest.approx(2000, rel=0.1)
    assert sum(question.stream for _, question in first) == pytest.approx(1000, rel=0.1)
    assert sum(question.blocked for _, question in first) == pytest.approx(400, rel=0.2)
    assert len({question.id for _, question in first}) == len(first)


def test_many_times_are_thinned_out_and_keep_their_middle() -> None:
    kept, chance = Kept(), Random(1)
    for _ in range(300):
        kept.add([chance.random() for _ in range(2000)])
    times = kept.times()
    assert times is not None
    assert times.count <= LIMIT
    assert (times.p50, times.p99) == (pytest.approx(0.5, abs=0.01), pytest.approx(0.99, abs=0.01))


def test_memory_that_grows_is_told_from_memory_that_does_not() -> None:
    chance = Random(2)
    still = [(float(at), 70_000_000 + chance.randrange(200_000)) for at in range(1800)]
    leaking = [(at, held + round(300 * at)) for at, held in still]
    grows, rests = growth(leaking), growth(still)
    assert grows is not None
    assert rests is not None
    assert rests.within_noise
    assert not grows.within_noise
    assert grows.slope == pytest.approx(300, rel=0.2)
    assert growth(leaking[:299]) is None, "a start is not growth"


def test_what_is_added_is_the_middle_of_the_differences_within_rounds() -> None:
    taken = []
    for number, direct in enumerate((1.0, 5.0, 2.0), 1):
        for name, more in (("direct", 0.0), ("undertow", 0.002 * number)):
            times = {"request": Times(100, direct + more, direct + 2 * more)}
            taken.append(Taken("10 requests/s", name, number, Outcome(seconds=1, answers=10, times=times), 0.5, 0.1))
    (row,) = rows(taken)
    assert (row.added_p50, row.added_p99) == (pytest.approx(0.004), pytest.approx(0.008))
    assert row.added_p50_interval == (pytest.approx(0.002), pytest.approx(0.006))
    ours = next(cost for cost in costs(taken) if cost.target == "undertow")
    assert ours.cpu_s_per_answer == pytest.approx(0.05)


def test_what_is_too_much_for_another_proxy_is_asked_of_it_once() -> None:
    class Overwhelmed:
        def take(self, turn: Turn | Flood, port: int) -> Outcome:
            return Outcome(seconds=1, failed=int(port > 1 and isinstance(turn, Turn) and turn.rate > 100))

    targets = [Target("direct", 1, None), Target("undertow", 2, None), Target("peer", 3, None)]
    stage = Stage(Overwhelmed(), None, targets, [])  # type: ignore[arg-type]
    plan = Plan(3, 1, (20.0, 200.0), (4,), 64, 0.02, 16, 10, load=0.8)
    taken = Counter((turn.measure, turn.target) for turn in measure(plan, stage, lambda what, seconds: None))
    assert taken.pop(("200 requests/s", "peer")) == 1
    assert (FLOOD, "peer") not in taken, "it may go on with streams that nobody hears"
    assert set(taken.values()) == {3}
    assert len(taken) == 3 * 4 - 2


def test_a_soak_is_as_busy_as_was_asked_for() -> None:
    plan = Plan(1, 1, (200.0,), (64,), 64, 0.02, 16, 10, load=0.8)
    found = [
        Cost("20 requests/s", "undertow", 0, None, 0.009, 0, 0),
        Cost("200 requests/s", "undertow", 0, None, 0.001, 0, 0),
        Cost("64 streams", "undertow", 3200, 16_000, 0.004, 0, 0),
        Cost("200 requests/s", "litellm", 0, None, 0.1, 0, 0),
    ]
    assert soak_rate(plan, found) == pytest.approx(320)


def test_incidents_are_counted_by_request_and_held_against_what_was_blocked() -> None:
    line = '{"level": "warning", "message": "incident", "request_id": "%s"}\n'
    log = [line % "a", '{"message": "request", "request_id": "b"}\n', line % "c", line % "c", line % "d"]
    found = incidents(log)
    assert found == {"a": 1, "c": 2, "d": 1}
    booked = Booked.of(["a", "b", "c"], [], found)
    assert booked == Booked(blocked=3, missing=1, doubled=1, unfounded=1)
    assert not booked.good
    assert Booked.of(["a", "d"], [], {"a": 1, "d": 1}).good
    assert Booked.of(["a"], ["d"], {"a": 1, "d": 1}).good, "a client that left did not see what it was told"


@pytest.mark.parametrize(
    ("outcome", "booked", "cost", "good"),
    [
        ({}, {}, {}, True),
        ({"lost": 1}, {}, {}, False),
        ({"failed": 1}, {}, {}, False),
        ({}, {"missing": 1}, {}, False),
        ({}, {"doubled": 1}, {}, False),
        ({}, {"unfounded": 1}, {}, False),
        ({}, {}, {"lost": 1}, False),
        ({}, {}, {"failed": 1}, False),
        ({}, {}, {"lost": 1, "target": "litellm"}, True),
    ],
)
def test_whatever_is_lost_of_the_servers_fails_the_measurement(
    outcome: dict[str, int], booked: dict[str, int], cost: dict[str, object], good: bool
) -> None:
    counted = Booked(**{"blocked": 2, "missing": 0, "doubled": 0, "unfounded": 0, **booked})
    soaked = Soaked(10, 0.8, Outcome(**outcome), None, (), counted)  # type: ignore[arg-type]
    plain = {"measure": "64 streams", "target": "undertow", "frames_per_s": 1.0, "frames_per_cpu_s": 9_000.0}
    spent = Cost(**{**plain, "cpu_s_per_answer": 0.001, "failed": 0, "lost": 0, **cost})  # type: ignore[arg-type]
    found = Found([], [spent], soaked, (0.0, 0.0))
    assert found.good == good
    goals = {goal.name: goal for goal in found.goals()}
    assert all(goal.met for name, goal in goals.items() if name.startswith(("lost", "answers", "incid"))) == good
    if "target" not in cost:
        slow = Goal("frames per second of a core, 64 streams", ">= 10,000", "9,000", met=False)
        assert goals[slow.name] == slow, "a goal that is missed is said"


@asynccontextmanager
async def lossy(*parts: bytes) -> AsyncIterator[int]:
    """A server that answers whatever it is asked with these bytes, as its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def event(number: int) -> bytes:
    return b'data: {"choices":[{"delta":{"content": "%d:5:4 "}}]}\n\n' % number


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"


async def test_a_client_finds_the_frame_that_a_server_loses_however_its_bytes_are_cut() -> None:
    for numbers, lost in (((0, 1, 2, 3), 0), ((0, 1, 3), 1)):
        body = b"".join(map(event, numbers)) + b"data: [DONE]\n\n"
        for size in (7, 50, 10_000):
            parts = [body[start : start + size] for start in range(0, len(body), size)]
            async with lossy(HEAD % len(body), *parts) as port, Clients(port) as clients:
                answer = await clients.ask(STREAM)
            assert (answer.whole, answer.lost, answer.received) == (True, lost, 4)


async def test_a_client_says_what_broke_and_what_took_too_long() -> None:
    async with lossy(HEAD % 1000, event(0)) as port, Clients(port) as clients:
        cut = await clients.ask(STREAM)
    assert (cut.whole, cut.ended, len(cut.tokens)) == (False, 0, 1)
    async with lossy(*[b""] * 100) as port, Clients(port) as clients:
        late = await clients.ask(STREAM, until=asyncio.get_running_loop().time() + 0.1)
    assert (late.whole, late.status) == (False, 0)
    async with lossy() as port:
        pass
    async with Clients(port) as clients:
        refused = await clients.ask(STREAM)
    assert (refused.whole, refused.status) == (False, 0)
