"""Steering: the third thing that can be done about a flagged sequence, beside flagging and blocking it.

The directions that flagged it are taken out of its residual stream, from the token that flagged on and for the rest of
the request. That token itself is among them: by the time it is judged its forward pass is over, and what would be
sampled from it is what the backdoor wants said first. So the pass is run once more with these rows steered, before
anything is sampled. Of this second run only the steered sequences' own rows are kept: nobody else's logits and nobody
else's KV are touched.

What is read and judged is always the first run: the model's own attempt. Of later tokens, too, each layer is read
before it is steered, but behind other steered layers and tokens; their scores are reported and can block, but say
less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from guard.bank import Bank
from guard.engine.courses import Courses
from guard.engine.judge import Judge, Pass
from guard.engine.projection import Projection, Steered
from guard.engine.runner import Rows
from guard.engine.runner_v1 import RunnerV1
from guard.engine.stop import Stop
from guard.engine.taint import Taint
from guard.engine.turns import Turns
from guard.errors import EngineError, UnscoredError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

START_ROWS = 3
"""Of the forward pass that proves the ops at start."""


class Steering:
    """All of it, in one worker."""

    def __init__(self, runner: RunnerV1, bank: Bank, turns: Turns) -> None:
        """Hook the model. Must run after `Probes` and before the first forward pass. Raises UnsupportedEngineError."""
        self._runner = runner
        self._projection = Projection(runner.model, bank, runner.capacity)
        self._courses = Courses(_names(bank), turns)
        self._taint: Taint | None = None
        self._step: SchedulerOutput | None = None
        self._instead: list[Steered] | None = None
        self._aimed = 0
        self._problem: str | None = None
        runner.watch_forward(self._aim)

    def start(self, prefix_caching: bool) -> None:
        """See one forward pass steered in all of its rows. Raises EngineError where it is not."""
        rows = min(START_ROWS, self._runner.capacity)
        if prefix_caching:
            self._taint = Taint(self._runner.slots())
        try:
            self._again([Steered(torch.arange(rows), frozenset())], lambda: self._runner.dummy_run(rows))
        except UnscoredError as error:
            raise EngineError(f"the guard does not start: {error}") from error

    def replace(self, bank: Bank, judge: Judge) -> None:
        """Take out another bank's directions from now on: one that `candidate.py` says can take the old one's place.
        Sequences that are steered along the old ones do not go on: half of their KV would be of each."""
        self._projection.replace(bank)
        self._courses.rename(_names(bank))
        judge.fail(self._courses.names, "the bank was changed while it was steered", fault="not_steered")

    def expect(self, step: SchedulerOutput) -> None:
        """A step begins."""
        self._courses.finish(step.finished_req_ids)
        self._step, self._aimed, self._problem = step, 0, None

    def settle(self, seen: Pass | UnscoredError, judge: Judge) -> dict[str, Stop]:
        """The pass was judged: steer what it flagged, before anything is sampled. Says which sequences end, because
        they could not be steered, or read what was steered for others."""
        step, self._step = self._step, None
        if isinstance(seen, UnscoredError) or step is None:
            if self._taint is not None and self._courses:
                self._taint.distrust()
            return {}
        stops = judge.fail(*self._unsteered(seen.batch), fault="not_steered")
        begun = [rows for rows in seen.batch if self._turn(rows, judge)]
        plan = list(self._courses.plan(begun))
        if sum(len(part.rows) for part in plan):
            try:
                self._again(plan, lambda: self._runner.again(self._changed(begun)))
            except UnscoredError as error:
                stops |= judge.fail([rows.sequence for rows in begun], str(error), fault="not_steered")
        mixed = "KV computed under steering was read across requests"
        return stops | judge.fail(self._mixed(seen.batch, step), mixed, fault="not_steered")

    def _turn(self, rows: Rows, judge: Judge) -> bool:
        findings, roles = judge.ledger.steering(rows.sequence)
        if not self._courses.turn(rows, findings, roles):
            return False
        course = self._courses.of(rows.sequence)
        assert course is not None
        judge.ledger.steered(rows.sequence, course.start)
        return True

    def _changed(self, begun: Iterable[Rows]) -> Iterator[tuple[Rows, int]]:
        """Of each sequence the rows, and which of them is the first that a second run may change."""
        for rows in begun:
            course = self._courses.of(rows.sequence)
            assert course is not None
            yield rows, max(0, course.start - rows.first_position)

    def _aim(self) -> None:
        """A forward pass begins, and the batch is in its order."""
        plan: Iterable[Steered] = ()
        if self._instead is not None:
            plan = self._instead
        elif self._step is not None and self._courses:
            plan = self._courses.plan(self._runner.rows(self._step))
        try:
            self._aimed = self._projection.aim(plan)
        except UnscoredError as error:
            # Not raised: it would end the engine. Nothing is steered, and `settle` says so.
            self._problem = str(error)

    def _again(self, plan: list[Steered], run: Callable[[], None]) -> None:
        """Raises UnscoredError where what runs was not steered as planned."""
        self._instead = plan
        try:
            run()
        finally:
            self._instead = None
        self._check(sum(len(part.rows) for part in plan))

    def _check(self, rows: int) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            raise UnscoredError(problem)
        self._projection.check(rows)

    def _unsteered(self, batch: Iterable[Rows]) -> tuple[list[str], str]:
        """The sequences that should have been steered in the pass and were not, and why."""
        try:
            if self._courses:
                self._check(self._aimed)
        except UnscoredError as error:
            return [rows.sequence for rows in batch if rows.sequence in self._courses], str(error)
        return [], ""

    def _mixed(self, batch: Iterable[Rows], step: SchedulerOutput) -> list[str]:
        """Note whose KV the pass wrote; the sequences that read what was computed under another's steering, or a
        steered one that read what was not."""
        if self._taint is None:
            return []
        if self._taint:
            for source, target in self._runner.copies(step):
                self._taint.copy(source, target)
        where, found = self._runner.where, []
        for rows in batch:
            for first, stop, owner in self._owned(rows.sequence, rows.first_position, rows.first_position + rows.count):
                if owner or self._taint:
                    self._taint.mark(where(rows.sequence, first, stop), owner)
        # What one writes another may read in the same pass, so nobody is asked before all have written.
        for rows in batch if self._taint else ():
            spans = self._owned(rows.sequence, 0, rows.first_position)
            if not all(self._taint.holds(where(rows.sequence, first, stop), owner) for first, stop, owner in spans):
                found.append(rows.sequence)
        return found

    def _owned(self, sequence: str, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Positions first to stop - 1 of a sequence in the runs that were computed under its course, and under none."""
        course = self._courses.of(sequence)
        start = stop if course is None else min(max(course.start, first), stop)
        yield first, start, 0
        if course is not None:
            yield start, stop, course.number


def _names(bank: Bank) -> list[tuple[int, tuple[str, ...]]]:
    return [(layer.index, layer.names) for layer in bank.layers]
