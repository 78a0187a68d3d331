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
from guard.engine.runner_v1 import Rows
from guard.errors import CalibrationError
from guard.verdict import PHASES

Keep = Literal["shape", "all"]
"""`shape`: the range of every token and the coordinates at decision positions, for calibration.
`all`: the coordinates of every token, for a comparison token by token."""


class Recorder:
    """Collects coordinates by phase until `write`."""

    def __init__(self, size: int, keep: Keep) -> None:
        self._keep = keep
        self._low = torch.full((2, size), torch.inf)
        self._high = torch.full((2, size), -torch.inf)
        self._decisions: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._tokens: dict[str, list[torch.Tensor]] = {}

    def add(self, coordinates: torch.Tensor, batch: Sequence[Rows]) -> None:
        """One step: coordinates float32 [T, size] and whose rows they are."""
        for rows in batch:
            own = coordinates[rows.first_row : rows.first_row + rows.count]
            if self._keep == "all":
                self._tokens.setdefault(rows.sequence, []).append(own.clone())
                continue
            boundary = min(rows.count, max(0, rows.prompt_tokens - rows.first_position))
            for phase, part in enumerate((own[:boundary], own[boundary:])):
                if len(part):
                    self._low[phase] = torch.minimum(self._low[phase], part.min(dim=0).values)
                    self._high[phase] = torch.maximum(self._high[phase], part.max(dim=0).values)
            if rows.samples:
                self._decisions[int(boundary < rows.count)].append(own[-1].clone())

    def write(self, path: Path) -> None:
        """Write what was kept to a safetensors file: `low`, `high` [2, size] and `references.PHASE` [N, size]; or, for
        `all`, one tensor [T, size] per sequence, named by its id."""
        if self._keep == "all":
            tensors = {name: torch.cat(parts).contiguous() for name, parts in self._tokens.items()}
        else:
            tensors = {"low": self._low, "high": self._high}
            for phase, rows in zip(PHASES, self._decisions, strict=True):
                size = self._low.shape[1]
                tensors[f"references.{phase}"] = torch.stack(rows) if rows else torch.empty(0, size)
        write_atomically(path, save(tensors, metadata={"keep": json.dumps(self._keep)}), CalibrationError)
