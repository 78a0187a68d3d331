"""One step of the engine, scored: coordinates of a batch in, each sequence's largest scores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from guard.engine.runner_v1 import Rows
from guard.scores import BankSpace, Detector, TokenScores
from guard.verdict import PHASES, DetectorName, Score


def score_step(
    space: BankSpace, detectors: Mapping[DetectorName, Detector], coordinates: torch.Tensor, batch: Sequence[Rows]
) -> Iterator[tuple[str, list[Score]]]:
    """Every detector's largest score of each sequence and phase in one step.

    Args:
        coordinates: float32 [T, size], the batch's rows in order.
        batch: whose rows they are; counts sum to T.
    """
    positions = torch.cat([torch.arange(rows.first_position, rows.first_position + rows.count) for rows in batch])
    counts = torch.tensor([rows.count for rows in batch])
    prompts = torch.repeat_interleave(torch.tensor([rows.prompt_tokens for rows in batch]), counts)
    phases = (positions >= prompts).long()
    decisions = torch.tensor([rows.first_row + rows.count - 1 for rows in batch if rows.samples], dtype=torch.int64)
    for name, detector in detectors.items():
        if detector.every_token:
            selected = torch.arange(len(positions))
            spans = [(rows, rows.first_row, rows.first_row + rows.count) for rows in batch]
        else:
            selected = decisions
            spans = [(rows, place, place + 1) for place, rows in enumerate(rows for rows in batch if rows.samples)]
        if not len(selected):
            continue
        scores = detector.score(coordinates[selected], phases[selected])
        for rows, first, last in spans:
            span = slice(first, last)
            yield rows.sequence, list(_largest(name, space, scores, phases[selected], positions[selected], span))


def _largest(
    detector: DetectorName,
    space: BankSpace,
    scores: TokenScores,
    phases: torch.Tensor,
    positions: torch.Tensor,
    span: slice,
) -> Iterator[Score]:
    """The largest score of each phase within one sequence's span; NaN counts as the largest."""
    # Positions ascend within a span, so the prompt's rows come first.
    boundary = span.start + int((phases[span] == 0).sum())
    for phase, first, last in zip(PHASES, (span.start, boundary), (boundary, span.stop), strict=True):
        if first == last:
            continue
        row = first + int(scores.values[first:last].argmax())
        coordinate = int(scores.coordinates[row])
        yield Score(
            detector,
            phase,
            float(scores.values[row]),
            int(positions[row]),
            space.layers[int(scores.layer_slots[row])],
            space.names[coordinate] if coordinate >= 0 else None,
        )
