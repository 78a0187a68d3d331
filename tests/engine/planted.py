"""Batches of several sequences, as vLLM's steps make them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from guard.engine.readings import Readings
from guard.engine.runner import Rows
from tests.guard.planted import SPACE, clean_lengths, clean_rows, clean_written


@dataclass(frozen=True, slots=True)
class Step:
    """One step: whose rows, what of the residual stream there is to see in each, and who speaks."""

    batch: list[Rows]
    coordinates: torch.Tensor
    written: torch.Tensor
    lengths: torch.Tensor
    roles: torch.Tensor

    @property
    def readings(self) -> Readings:
        """As the probes would give them: in full, the rows that decide."""
        whole = self.whole
        rows = torch.tensor([row for rows in self.batch for row in rows.deciding], dtype=torch.int64)
        return Readings(whole.cosines, whole.lengths, rows, whole.features[rows])

    @property
    def whole(self) -> Readings:
        """Every row in full, as for a recording."""
        return Readings.whole(SPACE, self.coordinates, self.written, self.lengths.clone())

    def rows(self, kept: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of some rows' coordinates, what was written, lengths and roles."""
        return (
            self.coordinates[kept].clone(),
            self.written[kept].clone(),
            self.lengths[kept].clone(),
            self.roles[kept].clone(),
        )


def step(batch: list[Rows], seed: int, spread: float = 0.3) -> Step:
    """Random readings and roles for the rows of a batch."""
    count = sum(rows.count for rows in batch)
    roles = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    seen = clean_rows(count, seed, spread), clean_written(count, seed, spread), clean_lengths(count, seed)
    return Step(batch, *seen, roles)


def random_step(seed: int, sequences: int = 6) -> Step:
    """Prompts' chunks, last chunks, decode rows, and rows that are computed again across the end of a prompt."""
    chance = random.Random(seed)
    batch: list[Rows] = []
    row = 0
    for index in range(sequences):
        prompt = chance.randint(1, 12)
        kind = chance.choice(["chunk", "last chunk", "decode", "resumed"])
        if kind == "chunk":
            first, count, samples = chance.randint(0, 3), chance.randint(1, 5), False
            prompt = max(prompt, first + count + 1)
        elif kind == "last chunk":
            first = chance.randint(0, prompt - 1)
            count, samples = prompt - first, True
        elif kind == "decode":
            first, count, samples = prompt + chance.randint(0, 9), 1, True
        else:
            first, count, samples = chance.randint(0, prompt - 1), prompt + 3, True
        batch.append(Rows(f"r{index}", row, count, first, prompt, samples))
        row += count
    return step(batch, seed)


def picked(some: Step, order: Sequence[int]) -> Step:
    """A step of some of its sequences, in this order."""
    moved: list[Rows] = []
    parts: list[torch.Tensor] = []
    row = 0
    for index in order:
        old = some.batch[index]
        parts.append(torch.arange(old.first_row, old.first_row + old.count))
        moved.append(Rows(old.sequence, row, old.count, old.first_position, old.prompt_tokens, old.samples))
        row += old.count
    return Step(moved, *some.rows(torch.cat(parts)))
