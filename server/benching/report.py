"""What a measurement found, for people; and what was wished for. Pure, but for what it says of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from guard.version import VERSION
from server.benching.bench import FLOOD
from server.benching.comparison import DIRECT, SERVER, Cost, Row, Taken, costs, rows
from server.benching.soak import Soaked

_PARTS = ("uvicorn", "uvloop", "httptools", "aiohttp", "fastapi", "pydantic")
ADDED_P50_S, ADDED_P99_S, AT_RATE = 0.002, 0.008, "200 requests/s"
FRAMES_PER_CPU_S = 10_000
PEER_FACTOR = 5


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that was wished for, and what was found."""

    name: str
    wished: str
    found: str
    met: bool


@dataclass(frozen=True, slots=True)
class Found:
    """All of a measurement."""

    rows: Sequence[Row]
    costs: Sequence[Cost]
    soaked: Soaked
    others: tuple[float, float]
    """Cores that everything else on the machine kept busy during turns: the median, and the most."""

    @classmethod
    def of(cls, taken: Sequence[Taken], soaked: Soaked) -> Found:
        others = [turn.others for turn in taken]
        return cls(rows(taken), costs(taken), soaked, (median(others), max(others)))

    @property
    def good(self) -> bool:
        """Nothing was lost, wherever it was asked, and every blocked request has exactly one incident."""
        return self.soaked.good and not any(cost.lost or cost.failed for cost in self.costs if cost.target == SERVER)

    def goals(self) -> list[Goal]:
        """All that this measurement can say of the goals; what it did not measure is left out."""
        return [*self._added(), *self._frames(), *self._nothing_lost(), *self._memory(), *self._against_peers()]

    def told(self) -> dict[str, Any]:
        """For JSON."""
        outcome = {**asdict(self.soaked.outcome), "blocked": len(self.soaked.outcome.blocked)}
        return {
            "goals": [asdict(goal) for goal in self.goals()],
            "rows": [asdict(row) for row in self.rows],
            "costs": [asdict(cost) for cost in self.costs],
            "soak": {**asdict(self.soaked), "outcome": outcome},
            "others": self.others,
        }

    def lines(self) -> Iterator[str]:
        """For people, line by line. Times in milliseconds."""
        yield (
            f"{'added, ms (95% of the median)':<44} {'direct':>8} {'through':>8} {'p50':>8} {'':18} "
            f"{'direct':>8} {'through':>8} {'p99':>8}"
        )
        for row in self.rows:
            yield f"{f'{row.measure}, {row.of}, {row.target}':<44} " + " ".join(
                f"{direct * 1e3:>8.2f} {through * 1e3:>8.2f} {added * 1e3:>8.2f} {_interval(interval):<18}"
                for direct, through, added, interval in (
                    (row.direct.p50, row.through.p50, row.added_p50, row.added_p50_interval),
                    (row.direct.p99, row.through.p99, row.added_p99, row.added_p99_interval),
                )
            )
        yield ""
        yield f"{'processor':<44} {'frames/s':>10} {'per core':>10} {'ms/answer':>10} {'failed':>7} {'lost':>5}"
        for cost in self.costs:
            if cost.target != DIRECT:
                per_core = f"{cost.frames_per_cpu_s:,.0f}" if cost.frames_per_cpu_s else "-"
                per_answer = f"{cost.cpu_s_per_answer * 1e3:.2f}" if cost.cpu_s_per_answer else "-"
                yield (
                    f"{f'{cost.measure}, {cost.target}':<44} {cost.frames_per_s:>10,.0f} {per_core:>10} "
                    f"{per_answer:>10} {cost.failed:>7} {cost.lost:>5}"
                )
        yield ""
        middle, most = self.others
        yield f"meanwhile everything else on the machine kept {middle:.2f} cores busy, {most:.2f} at most"
        yield from self._soak()
        yield ""
        for goal in self.goals():
            yield f"{'met' if goal.met else 'MISSED':<7} {goal.name:<50} {goal.wished:<24} {goal.found}"

    def _soak(self) -> Iterator[str]:
        outcome, growth = self.soaked.outcome, self.soaked.growth
        yield (
            f"soak: {outcome.seconds:.0f} s, {self.soaked.rate:.0f} requests/s, {self.soaked.busy:.0%} of a core; "
            f"{outcome.answers:,} answers, {outcome.frames:,} frames, {outcome.lost} lost, {outcome.failed} failed; "
            f"a request began {outcome.late_s * 1e3:.0f} ms late at most"
        )
        for name, times in outcome.times.items():
            yield f"  {name}: p50 {times.p50 * 1e3:.2f} ms, p99 {times.p99 * 1e3:.2f} ms"
        if outcome.failures:
            yield "  failed: " + ", ".join(f"{count} {how}" for how, count in sorted(outcome.failures.items()))
        if growth is not None:
            yield f"  memory: {growth.first_bytes / 1e6:.1f} MB at first, {growth.last_bytes / 1e6:.1f} MB at last"

    def _added(self) -> Iterator[Goal]:
        for row in self.rows:
            if (row.measure, row.of, row.target) == (AT_RATE, "request", SERVER):
                for name, added, most in (("p50", row.added_p50, ADDED_P50_S), ("p99", row.added_p99, ADDED_P99_S)):
                    wished = f"<= {most * 1e3:g} ms"
                    yield Goal(f"added {name} at {AT_RATE}", wished, f"{added * 1e3:.2f} ms", added <= most)

    def _frames(self) -> Iterator[Goal]:
        paced = [cost for cost in self.costs if cost.target == SERVER and cost.measure != FLOOD]
        for cost in [cost for cost in paced if cost.frames_per_cpu_s][-1:]:
            rate = cost.frames_per_cpu_s or 0.0
            name = f"frames per second of a core, {cost.measure}"
            yield Goal(name, f">= {FRAMES_PER_CPU_S:,}", f"{rate:,.0f}", rate >= FRAMES_PER_CPU_S)

    def _nothing_lost(self) -> Iterator[Goal]:
        ours = [cost for cost in self.costs if cost.target == SERVER]
        lost = sum(cost.lost for cost in ours) + self.soaked.outcome.lost
        failed = sum(cost.failed for cost in ours) + self.soaked.outcome.failed
        yield Goal("lost frames", "0", str(lost), lost == 0)
        yield Goal("answers that failed", "0", str(failed), failed == 0)
        booked = self.soaked.booked
        told = f"{booked.missing} missing, {booked.doubled} doubled, {booked.unfounded} unfounded"
        yield Goal("incidents in the soak", "one per blocked request", f"{booked.blocked:,}: {told}", booked.good)

    def _memory(self) -> Iterator[Goal]:
        growth = self.soaked.growth
        if growth is not None:
            slope, noise = growth.slope * 3600 / 1e6, growth.noise * 3600 / 1e6
            found = f"{slope:+.2f} MB/h, noise {noise:.2f}"
            yield Goal("memory in the soak", "slope within noise", found, growth.within_noise)

    def _against_peers(self) -> Iterator[Goal]:
        """How many times more another proxy adds than the server does: of whole answers, and to first tokens without
        what holding them back costs."""
        ours = {(row.measure, row.of): row.added_p50 for row in self.rows if row.target == SERVER}
        for row in self.rows:
            own = ours.get((row.measure, row.of), 0.0)
            if row.target != SERVER and row.of in ("request", "first token released") and own > 0:
                name, factor = f"{row.target} adds, {row.measure}, {row.of}", row.added_p50 / own
                yield Goal(name, f">= {PEER_FACTOR} times as much", f"{factor:.1f} times", factor >= PEER_FACTOR)


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"[{low * 1e3:.2f}, {high * 1e3:.2f}]"


def facts() -> dict[str, Any]:
    """The machine and the versions that were measured."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "undertow": VERSION,
        **{name: _version(name) for name in _PARTS},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
