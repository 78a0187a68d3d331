"""Scores kept under KV slots: read back as written, for every role, and never another calibration's."""

from __future__ import annotations

import torch

from guard.engine.shadow import Shadow
from guard.roles import ROLES


def written(slots: list[int], start: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = start + torch.arange(3.0 * len(slots)).reshape(-1, 3)
    return torch.tensor(slots), values, (10 * values).long()


def test_a_slot_gives_back_what_was_written_for_the_role_that_asks() -> None:
    shadow = Shadow(10)
    shadow.write(*written([7, 2, 4]))
    for role in range(len(ROLES)):
        found = shadow.read(torch.tensor([2, 7]), torch.tensor([role, role]))
        assert found is not None
        assert found[0].tolist() == [3.0 + role, 0.0 + role]
        assert found[1].tolist() == [30 + 10 * role, 10 * role]


def test_a_slot_that_was_never_written_is_unknown_and_so_is_all_that_is_asked_with_it() -> None:
    shadow = Shadow(10)
    shadow.write(*written([7, 2]))
    assert shadow.read(torch.tensor([7, 3]), torch.tensor([0, 0])) is None


def test_a_slot_that_was_written_again_has_the_last_score() -> None:
    shadow = Shadow(4)
    shadow.write(*written([1]))
    shadow.write(*written([1], start=50.0))
    found = shadow.read(torch.tensor([1]), torch.tensor([2]))
    assert found is not None
    assert float(found[0]) == 52.0


def test_what_is_forgotten_is_unknown_until_it_is_written_again() -> None:
    shadow = Shadow(4)
    shadow.write(*written([0, 1]))
    shadow.forget()
    assert shadow.read(torch.tensor([1]), torch.tensor([0])) is None
    shadow.write(*written([1]))
    assert shadow.read(torch.tensor([1]), torch.tensor([0])) is not None
    assert shadow.read(torch.tensor([0]), torch.tensor([0])) is None


def test_a_copied_block_takes_its_scores_along_and_whether_it_has_any() -> None:
    shadow = Shadow(12)
    shadow.write(*written([0, 1, 2, 8, 9, 10, 11]))
    shadow.copy(slice(0, 4), slice(8, 12))
    for slot in (0, 1, 2):
        source, target = (shadow.read(torch.tensor([each]), torch.tensor([1])) for each in (slot, slot + 8))
        assert source is not None
        assert target is not None
        assert source[0].tolist() == target[0].tolist()
    assert shadow.read(torch.tensor([11]), torch.tensor([1])) is None


def test_nan_is_kept_as_it_is() -> None:
    shadow = Shadow(4)
    shadow.write(torch.tensor([2]), torch.full((1, 3), torch.nan), torch.zeros(1, 3, dtype=torch.int64))
    found = shadow.read(torch.tensor([2]), torch.tensor([0]))
    assert found is not None
    assert bool(found[0].isnan())


def test_what_is_erased_is_unknown_until_it_is_written_again() -> None:
    shadow = Shadow(4)
    shadow.write(*written([0, 1]))
    shadow.erase(torch.tensor([1]))
    assert shadow.read(torch.tensor([1]), torch.tensor([0])) is None
    assert shadow.read(torch.tensor([0]), torch.tensor([0])) is not None
    shadow.write(*written([1]))
    assert shadow.read(torch.tensor([1]), torch.tensor([0])) is not None
