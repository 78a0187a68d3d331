"""Hours of traffic: what is lost, whether memory grows, whether every blocked request has one incident."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from server.benching.bench import FLOOD, Plan, Said
from server.benching.comparison import SERVER, Cost, Taken, costs
from server.benching.memory import Growth, growth
from server.benching.processes import BenchError
from server.benching.stage import HELD_BACK, Stage
from server.benching.turns import Outcome, Turn

_BLOCKED = 0.05
_SOAK = "soak"


@dataclass(frozen=True, slots=True)
class Booked:
    """Blocked requests, and the incidents that the server logged."""

    blocked: int
    missing: int
    """Blocked requests without an incident."""
    doubled: int
    """Requests with more than one."""
    unfounded: int
    """Incidents of requests that were not blocked."""

    @classmethod
    def of(cls, blocked: Collection[str], unclear: Collection[str], incidents: Mapping[str, int]) -> Booked:
        """`blocked`: request ids. `unclear`: those of which no client saw the end. `incidents`: how many there are, by
        request id."""
        ids = set(blocked)
        doubled = sum(count > 1 for count in incidents.values())
        return cls(len(ids), len(ids - incidents.keys()), doubled, len(incidents.keys() - ids - set(unclear)))

    @property
    def good(self) -> bool:
        """Every blocked request has exactly one, and nothing else has."""
        return self.missing + self.doubled + self.unfounded == 0


def incidents(lines: Iterable[str]) -> dict[str, int]:
    """From the server's log: by request id, how many lines are incidents."""
    counts: dict[str, int] = {}
    for line in lines:
        if '"message": "incident"' in line:
            name = json.loads(line)["request_id"]
            counts[name] = counts.get(name, 0) + 1
    return counts


@dataclass(frozen=True, slots=True)
class Soaked:
    """What a soak showed."""

    rate: float
    """Requests begun in a second: half of them streams, one in twenty to be blocked."""
    busy: float
    """Processor time of the server, in seconds per second."""
    outcome: Outcome
    growth: Growth | None
    resident: tuple[tuple[float, int], ...]
    """Seconds since its beginning, bytes that the server held."""
    booked: Booked

    @property
    def good(self) -> bool:
        """Nothing was lost, and every blocked request has exactly one incident."""
        return self.booked.good and self.outcome.lost + self.outcome.failed == 0


def soak(plan: Plan, stage: Stage, taken: Sequence[Taken], said: Said) -> Soaked:
    """Half streams, half whole answers, one in twenty to be blocked, as many as keep the server as busy as planned."""
    stage.dismiss_peers()
    server, rate = stage.server, soak_rate(plan, costs(taken))
    turn = Turn(_SOAK, plan.soak_s, rate, 0.5, plan.tokens, plan.interval_s, 0, HELD_BACK, _BLOCKED, told=True)
    begun, before = monotonic(), server.cpu_s()
    resident = [(0.0, server.resident_bytes())]

    def every_second() -> None:
        resident.append((monotonic() - begun, server.resident_bytes()))
        said(f"soak, {rate:.0f} requests/s", 1.0)

    outcome = stage.load.take(turn, server.port, every_second)
    used = server.cpu_s() - before
    with server.log.open(errors="replace") as lines:
        found = incidents(lines)
    return Soaked(
        rate,
        used / outcome.seconds,
        outcome,
        growth(resident),
        tuple(resident),
        Booked.of(outcome.blocked, outcome.unclear, found),
    )


def soak_rate(plan: Plan, found: Sequence[Cost]) -> float:
    """Requests a second that keep the server as busy as planned, by what they cost in the turns before.

    Raises BenchError where no turn says what they cost.
    """
    ours = [cost for cost in found if cost.target == SERVER and cost.cpu_s_per_answer and cost.measure != FLOOD]
    per_stream = [cost.cpu_s_per_answer for cost in ours if cost.frames_per_cpu_s and cost.cpu_s_per_answer]
    per_whole = [cost.cpu_s_per_answer for cost in ours if not cost.frames_per_cpu_s and cost.cpu_s_per_answer]
    if not per_stream or not per_whole:
        raise BenchError("nothing was answered, so nothing says how much the server can bear")
    # The busiest turns: what was little had the most to share.
    return plan.load / (0.5 * per_stream[-1] + 0.5 * per_whole[-1])
