"""A recording holds what a token-by-token loop would keep."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guard.engine.recorder import Keep, Recorder
from guard.engine.runner_v1 import Rows
from guard.errors import CalibrationError
from guard.verdict import PHASES
from tests.guard.planted import SPACE

from .planted import random_batch


def recorded(folder: Path, keep: Keep, steps: list[tuple[list[Rows], torch.Tensor]]) -> dict[str, torch.Tensor]:
    recorder = Recorder(SPACE.size, keep)
    for batch, coordinates in steps:
        own = coordinates.clone()
        recorder.add(own, batch)
        own.fill_(99)  # the worker's buffer is written again in the next step
    recorder.write(folder / "recording")
    tensors: dict[str, torch.Tensor] = load_file(folder / "recording")
    return tensors


STEPS = [random_batch(seed) for seed in range(12)]


def test_a_shape_is_the_range_of_every_token_and_the_rows_that_decide(tmp_path: Path) -> None:
    found = recorded(tmp_path, "shape", STEPS)
    tokens: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    decisions: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for batch, coordinates in STEPS:
        for rows in batch:
            for offset in range(rows.count):
                phase = int(rows.first_position + offset >= rows.prompt_tokens)
                tokens[phase].append(coordinates[rows.first_row + offset])
                if rows.samples and offset == rows.count - 1:
                    decisions[phase].append(coordinates[rows.first_row + offset])
    assert found.keys() == {"low", "high", "references.prompt", "references.completion"}
    for phase in (0, 1):
        every = torch.stack(tokens[phase])
        assert torch.equal(found["low"][phase], every.min(dim=0).values)
        assert torch.equal(found["high"][phase], every.max(dim=0).values)
        assert torch.equal(found[f"references.{PHASES[phase]}"], torch.stack(decisions[phase]))


def test_all_is_every_token_of_every_sequence_in_order(tmp_path: Path) -> None:
    found = recorded(tmp_path, "all", STEPS)
    expected: dict[str, list[torch.Tensor]] = {}
    for batch, coordinates in STEPS:
        for rows in batch:
            for offset in range(rows.count):
                expected.setdefault(rows.sequence, []).append(coordinates[rows.first_row + offset])
    assert found.keys() == expected.keys()
    for sequence, rows_of in expected.items():
        assert torch.equal(found[sequence], torch.stack(rows_of))


def test_a_phase_that_was_never_seen_has_no_references_and_a_range_that_nothing_lies_in(tmp_path: Path) -> None:
    found = recorded(tmp_path, "shape", [([Rows("a", 0, 2, 0, 2, True)], torch.ones(2, SPACE.size))])
    assert found["references.completion"].shape == (0, SPACE.size)
    assert found["references.prompt"].shape == (1, SPACE.size)
    assert (found["low"][1] > found["high"][1]).all()


@pytest.mark.parametrize("phase", [0, 1])
def test_nan_in_a_clean_token_is_kept_and_not_skipped(tmp_path: Path, phase: int) -> None:
    spoiled = torch.ones(3, SPACE.size)
    spoiled[1, 4] = math.nan
    prompt = 3 if phase == 0 else 0
    found = recorded(tmp_path, "shape", [([Rows("a", 0, 3, 0, prompt, True)], spoiled)])
    assert found["low"][phase].isnan().tolist() == [index == 4 for index in range(SPACE.size)]


def test_a_recording_into_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="absent"):
        Recorder(SPACE.size, "shape").write(tmp_path / "absent" / "file")
