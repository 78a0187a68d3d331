"""Clients in a process of their own: a turn per line of standard input, what came of it on standard output.

python -m server.benching.load
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

import uvloop

from server.benching.client import Clients, Question, disorder
from server.benching.turns import Flood, Outcome, Tally, Turn

_MOST = 4096
"""Requests at a time. Clients that have as many wait, and say how late they were."""
_ENDLESS = 10**9


async def take(turn: Turn, port: int) -> Outcome:
    """Ask what the turn says, and wait for all answers."""
    loop = asyncio.get_running_loop()
    tally, running, late = Tally(turn.held), asyncio.Semaphore(_MOST), 0.0
    async with Clients(port) as clients:

        async def ask(question: Question, due: float) -> None:
            until = due + turn.interval_s * question.tokens + turn.grace_s
            tally.add(await clients.ask(question, until))
            running.release()

        teller = asyncio.ensure_future(_tell(tally.outcome)) if turn.told else None
        begun = loop.time()
        try:
            async with asyncio.TaskGroup() as tasks:
                for at, question in turn.schedule():
                    if (pause := begun + at - loop.time()) > 0:
                        await asyncio.sleep(pause)
                    await running.acquire()
                    late = max(late, loop.time() - begun - at)
                    tasks.create_task(ask(question, begun + at))
        finally:
            if teller is not None:
                teller.cancel()
    outcome = tally.close()
    outcome.seconds, outcome.late_s = loop.time() - begun, late
    return outcome


async def flood(turn: Flood, port: int) -> Outcome:
    """Streams without end, cut off after the turn's seconds."""
    loop, outcome = asyncio.get_running_loop(), Outcome()
    async with Clients(port) as clients:
        begun = loop.time()
        question = Question(_ENDLESS, 0.0, stream=True)
        heard = await asyncio.gather(*(clients.ask(question, until=begun + turn.seconds) for _ in range(turn.streams)))
        outcome.seconds = loop.time() - begun
    for each in heard:
        numbers = [number for number, _, _ in each.tokens]
        outcome.frames += len(numbers)
        outcome.lost += disorder(numbers, len(numbers))
        # One that has not begun yet is no fault: they leave nobody time to spare.
        if each.status not in (0, 200):
            outcome.failed += 1
            outcome.failures[f"status {each.status}"] = outcome.failures.get(f"status {each.status}", 0) + 1
    return outcome


async def _tell(outcome: Outcome) -> None:
    while True:
        await asyncio.sleep(1)
        _say("progress", {"answers": outcome.answers, "frames": outcome.frames, "failed": outcome.failed})


def _say(kind: str, value: dict[str, Any]) -> None:
    print(json.dumps({kind: value}), flush=True)  # noqa: T201 - whoever started it reads this


async def main() -> None:
    """Until standard input ends."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        if "flood" in asked:
            outcome = await flood(Flood(**asked["flood"]), asked["port"])
        else:
            outcome = await take(Turn(**asked["turn"]), asked["port"])
        _say("outcome", asdict(outcome))


if __name__ == "__main__":
    uvloop.run(main())
