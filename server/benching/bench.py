"""What is measured, and the turns of it. The whole measurement:

with stage(plan, folder) as found:
    taken = measure(plan, found, said)
    soaked = soak(plan, found, taken, said)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from server.benching.comparison import Taken
from server.benching.processes import LiteLLM
from server.benching.stage import Stage, Target
from server.benching.turns import Flood, Turn

FLOOD = "streams at full speed"

Said = Callable[[str, float], None]
"""What is measured now, and how many seconds of the plan are over since the last time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and for how long."""

    rounds: int
    seconds: float
    """Of each turn."""
    rates: tuple[float, ...]
    """Of whole answers, requests a second."""
    streams: tuple[int, ...]
    """That run at a time, on average."""
    tokens: int
    """Of a stream."""
    interval_s: float
    """Between two tokens."""
    flood: int
    """Streams at full speed."""
    soak_s: float
    load: float
    """Of a core, the share that the server is to be busy in the soak."""
    litellm: Path | None = None
    peer_port: int | None = None
    engine_port: int = 0

    @property
    def targets(self) -> int:
        return 2 + (self.litellm is not None) + (self.peer_port is not None)

    @property
    def measures(self) -> int:
        """Turns of one target in one round."""
        return len(self.rates) + len(self.streams) + 1

    @property
    def total_s(self) -> float:
        """How long it takes, roughly."""
        return (self.rounds * self.measures + 1) * self.targets * self.seconds + self.soak_s


def measure(plan: Plan, stage: Stage, said: Said) -> list[Taken]:
    """Every measure of every target, round by round; who goes first changes every round.

    What is too much for another proxy is asked of it once, and it begins anew where that can be done: it would still be
    at it when the others have their turns.
    """
    targets, too_much = stage.targets, set[tuple[str, str]]()
    for target in targets:
        said(f"warming up, {target.name}", plan.seconds)
        _warm_up(plan, stage, target)
    taken: list[Taken] = []
    for number in range(1, plan.rounds + 1):
        first = number % len(targets)
        order = [*targets[first:], *targets[:first]]
        for index in range(plan.measures):
            for target in order:
                name, turn = _turns(plan, number, target)[index]
                said(f"round {number}, {name}, {target.name}", plan.seconds)
                # Others go on with streams that nobody hears any more: these would never end.
                endless = target.peer and isinstance(turn, Flood)
                if not endless and (name, target.name) not in too_much:
                    taken.append(_take(stage, name, turn, target, number))
                    if target.peer and taken[-1].outcome.failed:
                        too_much.add((name, target.name))
                        if isinstance(target.child, LiteLLM):
                            target.child.restart()
                            _warm_up(plan, stage, target)
    return taken


def _warm_up(plan: Plan, stage: Stage, target: Target) -> None:
    """Connections, caches, code that has never run."""
    stage.load.take(_requests(plan, plan.rates[0], 0, target), target.port)


def _take(stage: Stage, name: str, turn: Turn | Flood, target: Target, number: int) -> Taken:
    begun, before = monotonic(), target.child.cpu_s() if target.child else 0.0
    others = stage.others_s()
    outcome = stage.load.take(turn, target.port)
    used = target.child.cpu_s() - before if target.child else None
    share = (stage.others_s() - others) / (monotonic() - begun)
    return Taken(name, target.name, number, outcome, used, max(0.0, share))


def _turns(plan: Plan, number: int, target: Target) -> list[tuple[str, Turn | Flood]]:
    """Of one round, by name. The same requests at the same moments for every target."""
    return [
        *((f"{rate:g} requests/s", _requests(plan, rate, number, target)) for rate in plan.rates),
        *((f"{streams} streams", _streams(plan, streams, number, target)) for streams in plan.streams),
        (FLOOD, Flood(plan.seconds, plan.flood)),
    ]


def _requests(plan: Plan, rate: float, seed: int, target: Target) -> Turn:
    return Turn("requests", plan.seconds, rate, 0, plan.tokens, plan.interval_s, seed, target.held)


def _streams(plan: Plan, streams: int, seed: int, target: Target) -> Turn:
    rate = streams / (plan.tokens * plan.interval_s)
    return Turn("streams", plan.seconds, rate, 1, plan.tokens, plan.interval_s, seed, target.held)
