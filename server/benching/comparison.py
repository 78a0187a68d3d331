"""What stood between the clients and the engine, and what that cost: turns of one round, side by side. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from guard.intervals import median_interval
from server.benching.turns import Outcome, Times

DIRECT, SERVER = "direct", "undertow"


@dataclass(frozen=True, slots=True)
class Taken:
    """A turn that was taken."""

    measure: str
    target: str
    round: int
    outcome: Outcome
    cpu_s: float | None
    """Processor time of whatever was asked; None where that is not known."""
    others: float
    """Cores that everything else on the machine kept busy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of time of one measure, added by one target to the way without it: seconds, medians of all rounds."""

    measure: str
    of: str
    target: str
    direct: Times
    through: Times
    added_p50: float
    added_p50_interval: tuple[float, float]
    added_p99: float
    added_p99_interval: tuple[float, float]
    rounds: int


def rows(taken: Sequence[Taken]) -> list[Row]:
    """Every measure, every kind of time, every target but the direct way."""
    found: list[Row] = []
    for measure in dict.fromkeys(each.measure for each in taken):
        here = [each for each in taken if each.measure == measure]
        direct = {each.round: each.outcome.times for each in here if each.target == DIRECT}
        for target in dict.fromkeys(each.target for each in here if each.target != DIRECT):
            through = {each.round: each.outcome.times for each in here if each.target == target}
            kinds = dict.fromkeys(kind for times in through.values() for kind in times)
            for kind in kinds:
                pairs = [
                    (direct[number][kind], times[kind])
                    for number, times in through.items()
                    if kind in times and kind in direct.get(number, {})
                ]
                if pairs:
                    found.append(_row(measure, kind, target, pairs))
    return found


def _row(measure: str, of: str, target: str, pairs: Sequence[tuple[Times, Times]]) -> Row:
    p50 = [through.p50 - direct.p50 for direct, through in pairs]
    p99 = [through.p99 - direct.p99 for direct, through in pairs]
    return Row(
        measure, of, target, _middle([direct for direct, _ in pairs]), _middle([through for _, through in pairs]),
        median(p50), median_interval(p50), median(p99), median_interval(p99), len(pairs),
    )  # fmt: skip


def _middle(times: Sequence[Times]) -> Times:
    return Times(sum(each.count for each in times), median(t.p50 for t in times), median(t.p99 for t in times))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a target's processor did in one measure, over all rounds."""

    measure: str
    target: str
    frames_per_s: float
    """As they came."""
    frames_per_cpu_s: float | None
    cpu_s_per_answer: float | None
    failed: int
    lost: int


def costs(taken: Sequence[Taken]) -> list[Cost]:
    """Every measure of every target."""
    found: list[Cost] = []
    for measure, target in dict.fromkeys((each.measure, each.target) for each in taken):
        here = [each for each in taken if (each.measure, each.target) == (measure, target)]
        told = [each.cpu_s for each in here if each.cpu_s is not None]
        cpu_s = sum(told) if len(told) == len(here) else None

        def total(of: Callable[[Outcome], float], here: Sequence[Taken] = here) -> float:
            return sum(of(each.outcome) for each in here)

        frames, answers = total(lambda outcome: outcome.frames), total(lambda outcome: outcome.answers)
        found.append(
            Cost(
                measure,
                target,
                frames_per_s=frames / total(lambda outcome: outcome.seconds),
                frames_per_cpu_s=frames / cpu_s if cpu_s and frames else None,
                cpu_s_per_answer=cpu_s / answers if cpu_s and answers else None,
                failed=int(total(lambda outcome: outcome.failed)),
                lost=int(total(lambda outcome: outcome.lost)),
            )
        )
    return found
