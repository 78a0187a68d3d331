"""What calibration and tests read from a worker: coordinates in bank space, never activations.

Off while serving. A worker that records keeps what it is told to and writes it to a file when asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from guard.atomic import write_atomically
from guard.engine.readings import Readings
from guard.engine.runner import Rows
from guard.errors import CalibrationError
from guard.roles import ROLES
from guard.scores import BankSpace, Moments
from guard.verdict import PHASES

Keep = Literal["shape", "all"]
"""`shape`: the range of every token and the moments of decisions, for calibration.
`all`: the coordinates of every token, for a comparison token by token."""

HEAD = 16
"""Attention sinks are looked for among so many first positions."""
SINK_LENGTH = 8.0
"""A sink's residual is at least so many times as long as the median of its prompt, after some watched layer."""
BLOCK = 4096
"""Decisions are gathered until so many stand together; then only their moments are kept."""


class Recorder:
    """Collects what clean traffic looks like until `write`."""

    def __init__(self, space: BankSpace, keep: Keep) -> None:
        self._space = space
        self._keep = keep
        # The last place along the first axis stands for all positions behind the head.
        self._low = torch.full((HEAD + 1, len(ROLES), space.size), torch.inf)
        self._high = torch.full((HEAD + 1, len(ROLES), space.size), -torch.inf)
        self._long = torch.zeros(HEAD, dtype=torch.int64)
        self._prompts = torch.zeros(HEAD, dtype=torch.int64)
        self._pending: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._moments: tuple[list[Moments], list[Moments]] = ([], [])
        self._tokens: dict[str, list[torch.Tensor]] = {}

    def add(self, readings: Readings, roles: torch.Tensor, batch: Sequence[Rows]) -> None:
        """One step: the readings of its rows, all in full, their roles int64 [T], and whose rows they are."""
        coordinates = readings.coordinates(self._space)
        for rows in batch:
            span = slice(rows.first_row, rows.first_row + rows.count)
            own = coordinates[span]
            if self._keep == "all":
                self._tokens.setdefault(rows.sequence, []).append(own.clone())
                continue
            self._widen(own, roles[span], rows.first_position)
            self._look_for_sinks(readings.lengths[span], rows.first_position)
            if rows.samples:
                phase = int(rows.first_position + rows.count > rows.prompt_tokens)
                self._keep_decision(phase, readings.features[span.stop - 1 : span.stop].clone())

    def _widen(self, own: torch.Tensor, roles: torch.Tensor, first_position: int) -> None:
        places = torch.arange(first_position, first_position + len(own)).clamp_max(HEAD)
        groups = places * len(ROLES) + roles
        for group in sorted(set(groups.tolist())):
            place, role = divmod(group, len(ROLES))
            part = own[groups == group]
            self._low[place, role] = torch.minimum(self._low[place, role], part.amin(dim=0))
            self._high[place, role] = torch.maximum(self._high[place, role], part.amax(dim=0))

    def _look_for_sinks(self, lengths: torch.Tensor, first_position: int) -> None:
        # A chunk of the prompt's beginning, long enough to say what is usual; a decode row is not.
        if first_position or len(lengths) < HEAD // 2:
            return
        head = lengths[:HEAD]
        self._long[: len(head)] += (head > SINK_LENGTH * lengths.median(dim=0).values).any(dim=-1)
        self._prompts[: len(head)] += 1

    def _keep_decision(self, phase: int, found: torch.Tensor) -> None:
        pending = self._pending[phase]
        pending.append(found)
        if len(pending) >= BLOCK:
            self._moments[phase].append(Moments.of(torch.cat(pending)))
            pending.clear()

    def write(self, path: Path) -> None:
        """Write what was kept to a safetensors file: `low`, `high` [3, size], `sinks` [S], and per phase `count.PHASE`
        [1], `mean.PHASE` [size] and `covariance.PHASE` [size, size]; or, for `all`, one tensor [T, size] per sequence,
        named by its id."""
        if self._keep == "all":
            tensors = {name: torch.cat(parts).contiguous() for name, parts in self._tokens.items()}
        else:
            # In most prompts that were long enough to tell.
            sinks = (2 * self._long > self._prompts).nonzero().squeeze(-1)
            used = torch.ones(HEAD + 1, dtype=torch.bool)
            used[sinks] = False
            tensors = {"low": self._low[used].amin(dim=0), "high": self._high[used].amax(dim=0), "sinks": sinks}
            for phase, pending, moments in zip(PHASES, self._pending, self._moments, strict=True):
                parts = [*moments, *([Moments.of(torch.cat(pending))] if pending else [])]
                tensors[f"count.{phase}"] = torch.tensor([sum(part.count for part in parts)])
                if parts:
                    merged = Moments.merged(parts)
                    tensors[f"mean.{phase}"], tensors[f"covariance.{phase}"] = merged.mean, merged.covariance
        write_atomically(path, save(tensors, metadata={"keep": json.dumps(self._keep)}), CalibrationError)
