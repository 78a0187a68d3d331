"""A pass that flags runs again, steered, before anything is sampled; whoever should have been steered and was not, or
read what was steered for others, does not pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guard.engine.finding import Finding
from guard.engine.runner import Rows
from guard.engine.steering import Steering
from guard.engine.stop import Stop
from guard.engine.turns import Turns
from guard.errors import EngineError, UnscoredError
from guard.faults import Fault
from guard.verdict import Score, Verdict
from tests.guard.planted import ROLE_MAP

from .test_engine_projection import HIDDEN, Model, a_bank, oblique

PROMPT = (2, 9, 9, 9, 9, 9, 3, 9)
BLOCK = 4
MIXED = "KV computed under steering was read across requests"


@dataclass
class Runner:
    """What `RunnerV1` gives, of a model of three layers."""

    model: Model = field(default_factory=Model)
    capacity: int = 32
    batch: tuple[Rows, ...] = ()
    blocks: dict[str, list[int]] = field(default_factory=dict)
    ran: int = 0
    reruns: bool = True
    changed: list[tuple[str, int]] = field(default_factory=list)
    before: Callable[[], None] = lambda: None
    copied: tuple[tuple[slice, slice], ...] = ()

    def watch_forward(self, before: Callable[[], None]) -> None:
        self.before = before

    def forward(self, rows: int) -> None:
        self.before()
        self.ran += 1
        self.model(torch.ones(rows, HIDDEN), torch.ones(rows, HIDDEN))

    dummy_run = forward

    def again(self, changed: Iterable[tuple[Rows, int]]) -> None:
        self.changed = [(rows.sequence, first) for rows, first in changed]
        if self.reruns:
            self.forward(sum(rows.count for rows in self.batch))

    def rows(self, step: Any) -> Iterator[Rows]:
        yield from self.batch

    def where(self, sequence: str, first: int, stop: int) -> torch.Tensor:
        at = torch.arange(first, stop)
        return torch.tensor(self.blocks[sequence])[at // BLOCK] * BLOCK + at % BLOCK

    def copies(self, step: Any) -> Iterator[tuple[slice, slice]]:
        yield from self.copied

    def slots(self) -> int:
        return 64


@dataclass
class Judge:
    """Says which sequences are steered, and remembers which could not be."""

    findings: dict[str, tuple[Finding, ...]] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ledger(self) -> Any:
        return SimpleNamespace(
            steering=lambda sequence: (self.findings.get(sequence, ()), None), steered=self.begun.__setitem__
        )

    def fail(self, sequences: Iterable[str], reason: str, fault: Fault = "unscorable") -> dict[str, Stop]:
        assert fault == "not_steered"
        names = list(sequences)
        self.failed |= dict.fromkeys(names, reason)
        return {name: Stop(0, 7) for name in names}


class Engine:
    """Steering, and the passes of an engine as it sees them."""

    def __init__(self, cache: bool = True) -> None:
        self.runner, self.judge = Runner(), Judge()
        self.turns = Turns(ROLE_MAP)
        runner: Any = self.runner
        self.steering = Steering(runner, a_bank({1: oblique(1), 2: oblique(2)}), self.turns)
        self.steering.start(cache)
        self.runner.ran = 0

    def run(self, *parts: tuple[str, int, int], finished: Sequence[str] = (), fault: bool = False) -> dict[str, Stop]:
        """One pass: of each sequence its rows from one position to before another."""
        batch, row = [], 0
        for name, first, stop in parts:
            self.turns.admit(name, PROMPT)
            batch.append(Rows(name, row, stop - first, first, len(PROMPT), True))
            row += stop - first
        self.runner.batch = tuple(batch)
        judge: Any = self.judge
        step: Any = SimpleNamespace(finished_req_ids=finished)
        self.steering.expect(step)
        self.runner.forward(row)
        seen: Any = UnscoredError("a fault") if fault else SimpleNamespace(batch=tuple(batch))
        return self.steering.settle(seen, judge)

    def flag(self, name: str, position: int, direction: str = "L1.o_proj.u0") -> None:
        verdict = Verdict(Score("density", "prompt", 2.0, position, 1, direction), 1.0, 0.01)
        self.judge.findings[name] = (Finding(verdict, position, 1),)


def test_a_pass_that_flags_nothing_runs_once() -> None:
    engine = Engine()
    assert engine.run(("a", 0, 8), ("b", 0, 8)) == {}
    assert engine.runner.ran == 1


def test_a_pass_that_flags_runs_again_and_only_what_flagged_is_kept_of_it() -> None:
    engine = Engine(cache=False)
    engine.flag("b", 7)
    assert engine.run(("a", 0, 8), ("b", 0, 8), ("c", 0, 3)) == {}
    assert (engine.runner.ran, engine.runner.changed) == (2, [("b", 7)])
    assert engine.judge.begun == {"b": 7}
    assert engine.steering._projection._rows[:1].tolist() == [15]


def test_what_is_steered_stays_so_without_a_second_run_until_it_ends() -> None:
    engine = Engine(cache=False)
    engine.flag("a", 7)
    engine.run(("a", 0, 8))
    assert engine.run(("b", 0, 8), ("a", 8, 9)) == {}
    assert engine.runner.ran == 3
    assert engine.steering._projection._rows[: engine.steering._aimed].tolist() == [8]
    assert engine.run(("b", 8, 9), finished=["a"]) == {}
    assert engine.steering._aimed == 0


def test_who_was_not_steered_in_a_pass_does_not_pass_and_its_neighbour_does() -> None:
    engine = Engine(cache=False)
    engine.flag("a", 7)
    engine.run(("a", 0, 8), ("b", 0, 8))
    engine.runner.model.model.layers[1]._forward_hooks.clear()
    assert engine.run(("a", 8, 9), ("b", 8, 9)) == {"a": Stop(0, 7)}
    assert "layer 1: its steering ran 0 times" in engine.judge.failed["a"]


def test_a_second_run_that_did_not_steer_ends_what_flagged() -> None:
    engine = Engine(cache=False)
    engine.runner.reruns = False
    engine.flag("a", 7)
    assert engine.run(("a", 0, 8), ("b", 0, 8)) == {"a": Stop(0, 7)}
    assert "its steering ran 1 times on 0 rows; expected one run on 1" in engine.judge.failed["a"]


def test_an_engine_in_which_an_op_does_not_run_does_not_start() -> None:
    runner: Any = Runner()
    steering = Steering(runner, a_bank({1: oblique(1), 2: oblique(2)}), Turns(ROLE_MAP))
    runner.model.model.layers[2]._forward_hooks.clear()
    with pytest.raises(EngineError, match="the guard does not start: layer 2: its steering ran 0 times"):
        steering.start(True)


def test_who_reads_what_was_steered_for_another_does_not_pass() -> None:
    engine = Engine()
    engine.runner.blocks = {"a": [0, 1, 2, 3], "b": [0, 1, 4, 5], "c": [0, 6, 7, 8]}
    engine.flag("a", 5)
    engine.run(("a", 0, 8))
    assert engine.run(("b", 8, 10), ("c", 4, 8)) == {"b": Stop(0, 7)}
    assert engine.judge.failed == {"b": MIXED}


def test_who_reads_it_in_the_same_pass_does_not_either() -> None:
    engine = Engine()
    engine.runner.blocks = {"a": [0, 1, 2, 3], "b": [0, 1, 4, 5]}
    engine.flag("a", 5)
    assert engine.run(("b", 8, 10), ("a", 0, 8)) == {"b": Stop(0, 7)}


def test_what_somebody_else_computed_since_is_nobodys() -> None:
    engine = Engine()
    engine.runner.blocks = {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}
    engine.flag("a", 5)
    engine.run(("a", 0, 8))
    assert engine.run(("b", 0, 8), finished=["a"]) == {}
    assert engine.run(("c", 8, 9)) == {}


def test_a_steered_sequence_that_comes_back_reads_its_own_and_nobody_elses() -> None:
    engine = Engine()
    engine.runner.blocks = {"a": [0, 1, 2], "other": [3, 4, 5]}
    engine.flag("a", 5)
    engine.run(("a", 0, 8), ("other", 0, 8))
    assert engine.run(("a", 8, 9)) == {}
    engine.runner.blocks["a"] = [3, 1, 2]  # before it was steered, everybody's is right
    assert engine.run(("a", 8, 9)) == {}
    engine.runner.blocks["a"] = [3, 4, 2]  # unsteered where it was
    assert engine.run(("a", 8, 9)) == {"a": Stop(0, 7)}
    assert engine.judge.failed == {"a": MIXED}


def test_a_copied_block_is_known_too() -> None:
    engine = Engine()
    engine.runner.blocks = {"a": [0, 1, 2], "b": [0, 9, 5]}
    engine.flag("a", 5)
    engine.run(("a", 0, 8))
    engine.runner.copied = ((slice(4, 8), slice(36, 40)),)
    assert engine.run(("b", 8, 9)) == {"b": Stop(0, 7)}


@pytest.mark.parametrize("steered", [False, True])
def test_behind_a_pass_that_nobody_could_read_old_kv_is_nobodys_where_one_was_steered(steered: bool) -> None:
    engine = Engine()
    engine.runner.blocks = {"a": [0, 1, 2], "b": [3, 4, 5]}
    if steered:
        engine.flag("a", 7)
    engine.run(("a", 0, 8), ("b", 0, 8))
    assert engine.run(("a", 8, 9), ("b", 8, 9), fault=True) == {}
    assert engine.run(("b", 9, 10)) == ({"b": Stop(0, 7)} if steered else {})


def test_another_bank_is_steered_along_from_then_on_and_who_was_steered_along_the_old_one_ends() -> None:
    engine = Engine(cache=False)
    engine.flag("a", 7)
    engine.run(("a", 0, 8), ("b", 0, 8))
    new: Any = a_bank({1: oblique(3), 2: oblique(4)})
    judge: Any = engine.judge
    engine.steering.replace(new, judge)
    assert engine.judge.failed == {"a": "the bank was changed while it was steered"}
    seen: list[torch.Tensor] = []
    engine.runner.model.model.layers[1].register_forward_hook(
        lambda _layer, _arguments, output: seen.append(output[0] + output[1])
    )
    engine.judge.findings = {}
    engine.flag("b", 8)
    engine.run(("b", 8, 9), finished=["a"])
    assert (seen[0][0] @ new.layers[0].directions[0]).abs() > 1e-2
    assert (seen[1][0] @ new.layers[0].directions[0]).abs() < 1e-4
