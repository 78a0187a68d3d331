"""A recording holds what a token-by-token loop would keep."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from guard.engine import recorder as recorder_module
from guard.engine.recorder import HEAD, SINK_LENGTH, Keep, Recorder
from guard.engine.runner import Rows
from guard.errors import CalibrationError
from guard.roles import ROLES
from guard.verdict import PHASES
from tests.guard.planted import SLOTS, SPACE, USUAL_LENGTHS, Array, float64, naive_moments

from .planted import Step, random_step, step


def recorded(folder: Path, keep: Keep, steps: list[Step]) -> dict[str, torch.Tensor]:
    recorder = Recorder(SPACE, keep)
    for some in steps:
        readings = some.whole
        roles = some.roles.clone()
        recorder.add(readings, roles, some.batch)
        # The worker's buffers are written again in the next step.
        readings.features.fill_(99)
        readings.lengths.fill_(99)
        roles.fill_(1)
    recorder.write(folder / "recording")
    tensors: dict[str, torch.Tensor] = load_file(folder / "recording")
    return tensors


def prompts(count: int, length: int, seed: int, longest: dict[int, float] | None = None) -> list[Step]:
    """Whole prompts, one per step; `longest`: the residual's length at a position, in units of what is usual."""
    steps = []
    for index in range(count):
        some = step([Rows(f"{seed}-{index}", 0, length, 0, length, True)], 1000 * seed + index)
        for position, times in (longest or {}).items():
            # After one watched layer is enough.
            some.lengths[position, 1] = times * USUAL_LENGTHS[1]
        steps.append(some)
    return steps


def ranges(steps: list[Step], sinks: set[int]) -> tuple[Array, Array]:
    """Per role the smallest and largest cosine of every token that is no sink."""
    low = np.full((len(ROLES), SPACE.size), np.inf)
    high = -low
    for some in steps:
        for rows in some.batch:
            for offset in range(rows.count):
                if rows.first_position + offset in sinks:
                    continue
                row = float64(some.coordinates[rows.first_row + offset])
                role = int(some.roles[rows.first_row + offset])
                low[role], high[role] = np.minimum(low[role], row), np.maximum(high[role], row)
    return low, high


def same_ranges(found: torch.Tensor, expected: Array | torch.Tensor) -> None:
    """Equal in what every token is held against; the others are told from where the residual stands and its length."""
    every = SPACE.of_every_token()
    assert np.array_equal(found[:, every], np.asarray(expected)[:, every])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def decisions(steps: list[Step]) -> tuple[Array, Array]:
    """Features of the rows whose logits are sampled, per phase."""
    found: tuple[list[Array], list[Array]] = ([], [])
    for some in steps:
        for rows in some.batch:
            if rows.samples:
                last = rows.first_row + rows.count - 1
                phase = int(rows.first_position + rows.count - 1 >= rows.prompt_tokens)
                lengths = float64(some.lengths[last])[list(SLOTS)]
                standing = float64(some.coordinates[last]) * lengths
                found[phase].append(np.concatenate([standing, float64(some.written[last])]))
    return np.array(found[0]), np.array(found[1])


STEPS = [random_step(seed) for seed in range(12)]


@pytest.mark.parametrize("block", [1, 4, 4096])
def test_a_shape_is_the_range_of_every_role_and_the_moments_of_decisions(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "BLOCK", block)
    found = recorded(tmp_path, "shape", STEPS)
    names = {f"{field}.{phase}" for field in ("count", "mean", "covariance") for phase in PHASES}
    assert found.keys() == {"low", "high", "sinks"} | names
    low, high = ranges(STEPS, set())
    same_ranges(found["low"], low)
    same_ranges(found["high"], high)
    assert found["sinks"].tolist() == []
    for phase, rows in zip(PHASES, decisions(STEPS), strict=True):
        mean, covariance = naive_moments(rows)
        assert found[f"count.{phase}"].tolist() == [len(rows)]
        assert found[f"mean.{phase}"].dtype == found[f"covariance.{phase}"].dtype == torch.float64
        np.testing.assert_allclose(found[f"mean.{phase}"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            found[f"covariance.{phase}"], covariance, rtol=1e-5, atol=1e-6 * np.abs(covariance).max()
        )


def test_all_is_every_token_of_every_sequence_in_order(tmp_path: Path) -> None:
    found = recorded(tmp_path, "all", STEPS)
    expected: dict[str, list[torch.Tensor]] = {}
    for some in STEPS:
        for rows in some.batch:
            for offset in range(rows.count):
                expected.setdefault(rows.sequence, []).append(some.coordinates[rows.first_row + offset])
    assert found.keys() == expected.keys()
    for sequence, rows_of in expected.items():
        same_ranges(found[sequence], torch.stack(rows_of))


def test_what_was_never_seen_has_no_moments_and_a_range_that_nothing_lies_in(tmp_path: Path) -> None:
    some = step([Rows("a", 0, 2, 0, 2, True)], 0)
    some.roles[:] = 1
    found = recorded(tmp_path, "shape", [some])
    assert found["count.completion"].tolist() == [0]
    assert "mean.completion" not in found
    assert found["count.prompt"].tolist() == [1]
    assert (found["covariance.prompt"] == 0).all()
    for role in (0, 2):
        assert (found["low"][role] == math.inf).all()
        assert (found["high"][role] == -math.inf).all()
    assert (found["low"][1] <= found["high"][1]).all()


@pytest.mark.parametrize("role", [0, 1, 2])
def test_nan_in_a_clean_token_is_kept_and_not_skipped(tmp_path: Path, role: int) -> None:
    some = step([Rows("a", 0, 3, 0, 3, True)], 0)
    some.roles[:] = role
    some.coordinates[1, 4] = math.nan
    found = recorded(tmp_path, "shape", [some])
    assert found["low"][role].isnan().tolist() == [index == 4 for index in range(SPACE.size)]


# -- attention sinks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [{0}, {3}, {0, 7}, {15}])
def test_positions_that_are_far_longer_than_their_prompt_are_sinks_and_leave_the_ranges(
    tmp_path: Path, positions: set[int]
) -> None:
    steps = prompts(9, 40, 1, dict.fromkeys(positions, 20.0)) + prompts(4, 30, 2)
    for some in steps[:9]:
        some.coordinates[sorted(positions)] = 9.0
    found = recorded(tmp_path, "shape", steps)
    assert found["sinks"].tolist() == sorted(positions)
    low, high = ranges(steps, positions)
    same_ranges(found["low"], low)
    same_ranges(found["high"], high)
    assert (found["high"] < 9.0).all()


def test_what_is_long_in_few_prompts_or_not_long_enough_is_no_sink(tmp_path: Path) -> None:
    few = prompts(4, 40, 1, {0: 20.0}) + prompts(5, 40, 2)
    assert recorded(tmp_path, "shape", few)["sinks"].tolist() == []
    assert recorded(tmp_path, "shape", prompts(9, 40, 3, {0: 0.6 * SINK_LENGTH}))["sinks"].tolist() == []
    assert recorded(tmp_path, "shape", prompts(9, 40, 3, {0: 1.5 * SINK_LENGTH}))["sinks"].tolist() == [0]
    # Far from the start nothing is a sink, and its tokens count.
    late = prompts(9, 40, 4, {HEAD: 20.0, 30: 20.0})
    found = recorded(tmp_path, "shape", late)
    assert found["sinks"].tolist() == []
    same_ranges(found["high"], ranges(late, set())[1])


def test_sinks_are_looked_for_where_prompts_begin_and_nowhere_else(tmp_path: Path) -> None:
    """Position 2 is long in whole prompts. Later chunks, short prompts and decode rows say nothing for or against."""
    steps = prompts(3, 40, 1, {2: 20.0})
    for index in range(20):
        steps += [
            step([Rows(f"later {index}", 0, 12, 1, 40, False)], 50 + index),
            step([Rows(f"short {index}", 0, 3, 0, 3, True)], 80 + index),
            step([Rows(f"decode {index}", 0, 1, 2, 2, True)], 110 + index),
        ]
    found = recorded(tmp_path, "shape", steps)
    assert found["sinks"].tolist() == [2]
    # The sink's position is left out of the ranges of all.
    same_ranges(found["low"], ranges(steps, {2})[0])


def test_a_decision_at_a_sink_is_kept_as_any_other(tmp_path: Path) -> None:
    steps = [*prompts(9, 40, 1, {0: 20.0}), step([Rows("one", 0, 1, 0, 1, True)], 7)]
    found = recorded(tmp_path, "shape", steps)
    assert found["sinks"].tolist() == [0]
    assert found["count.prompt"].tolist() == [10]
    np.testing.assert_allclose(found["mean.prompt"], decisions(steps)[0].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_recording_into_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="absent"):
        Recorder(SPACE, "shape").write(tmp_path / "absent" / "file")
