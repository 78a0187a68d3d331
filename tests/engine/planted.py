"""Batches of several sequences, as vLLM's steps make them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from guard.engine.runner_v1 import Rows
from tests.guard.planted import clean_rows


def random_batch(seed: int, sequences: int = 6) -> tuple[list[Rows], torch.Tensor]:
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
    return batch, clean_rows(row, seed, spread=0.3)


def reordered(
    batch: Sequence[Rows], coordinates: torch.Tensor, order: Sequence[int]
) -> tuple[list[Rows], torch.Tensor]:
    """The same batch with its sequences in another order."""
    moved: list[Rows] = []
    parts: list[torch.Tensor] = []
    row = 0
    for index in order:
        old = batch[index]
        parts.append(coordinates[old.first_row : old.first_row + old.count])
        moved.append(Rows(old.sequence, row, old.count, old.first_position, old.prompt_tokens, old.samples))
        row += old.count
    return moved, torch.cat(parts)
