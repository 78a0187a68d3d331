"""The guard's worker, with somebody looking over its shoulder: what it judged is noted, and nothing is changed."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.engine.noted import Noted
from guard.engine.judge import Judge, Pass
from guard.engine.ledger import Ledger
from guard.engine.runner import Rows
from guard.engine.worker import GuardWorker


class WatchedWorker(GuardWorker):
    """Give it to vLLM as `--worker-cls benchmarks.engine.watched.WatchedWorker`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._noted: dict[str, Noted] = {}
        self._counts: Counter[str] = Counter()
        self._now: Pass | None = None
        judge, recall, cover, ended = Judge.judge, Judge._recall, Ledger.cover, Ledger.ended

        def judging(this: Judge, seen: Pass, sampled: Mapping[str, int], *rest: Any) -> Any:
            self._now = seen
            self._counts["steps"] += 1
            for rows in seen.batch:
                if rows.guesses:
                    self._counts["guesses"] += max(0, sampled.get(rows.sequence, 0) - 1)
                # What was computed before is computed again: the sequence had lost its KV.
                self._counts["preemptions"] += rows.first_position in self._of(rows.sequence).computed
            return judge(this, seen, sampled, *rest)

        def recalling(this: Judge, part: Rows, shadow: Any, where: Any) -> None:
            missing = this.ledger.missing(part)
            recall(this, part, shadow, where)
            if missing and not this.ledger.missing(part):
                roles = this._turns.between(part.sequence, missing.start, missing.stop)
                values, _ = shadow.read(where(part.sequence, missing.start, missing.stop), roles)
                self._of(part.sequence).recalled |= dict(zip(missing, values.tolist(), strict=True))

        def covering(this: Ledger, rows: Rows) -> None:
            cover(this, rows)
            assert self._now is not None
            readings, own = self._now.readings, self._of(rows.sequence)
            full = dict(zip(readings.decisions.tolist(), readings.features.numpy(), strict=True))
            for offset, row in enumerate(rows.all):
                own.computed[rows.first_position + offset] = (
                    readings.cosines[row].numpy().copy(),
                    readings.lengths[row].numpy().copy(),
                    full[row].copy() if row in full else None,
                )

        def ending(this: Ledger, rows: Rows) -> bool:
            over = ended(this, rows)
            self._counts["behind the end"] += over
            return over

        for target, name, watch in (
            (Judge, "judge", judging),
            (Judge, "_recall", recalling),
            (Ledger, "cover", covering),
            (Ledger, "ended", ending),
        ):
            mock.patch.object(target, name, watch).start()

    def fuzz_write(self, path: str) -> None:
        """Write what was noted, by the id that the caller gave each sequence, and the counts."""
        self._counts["ahead"] = int(self._runner.schedules_ahead())
        Path(path).write_bytes(pickle.dumps((self._noted, dict(self._counts))))

    def _of(self, sequence: str) -> Noted:
        # vLLM adds a random tail to the id that it was given.
        return self._noted.setdefault(sequence.rpartition("-")[0], Noted())
