"""Whose steering the KV in a slot was computed under is known for as long as it lies there."""

from __future__ import annotations

import torch

from guard.engine.taint import Taint

SLOTS = torch.arange(4, 8)


def test_what_nobody_steered_is_everybodys() -> None:
    taint = Taint(16)
    taint.mark(SLOTS, 0)
    assert not taint
    assert taint.holds(torch.arange(16), 0)


def test_what_was_steered_is_its_own_alone() -> None:
    taint = Taint(16)
    taint.mark(SLOTS, 3)
    assert taint
    assert taint.holds(SLOTS, 3)
    assert not taint.holds(SLOTS, 0)
    assert not taint.holds(SLOTS, 4)
    assert not taint.holds(torch.tensor([3, 4]), 0), "one slot is enough"
    assert not taint.holds(torch.tensor([3, 4]), 3), "what was not steered is not the steered one's either"
    assert taint.holds(torch.tensor([0, 3, 8]), 0)


def test_whoever_overwrites_a_slot_overwrites_whose_it_is() -> None:
    taint = Taint(16)
    taint.mark(SLOTS, 3)
    taint.mark(SLOTS[:2], 0)
    taint.mark(SLOTS[2:3], 5)
    assert taint.holds(SLOTS[:2], 0)
    assert taint.holds(SLOTS[2:3], 5)
    assert taint.holds(SLOTS[3:], 3)


def test_a_copied_block_is_whosever_the_block_was() -> None:
    taint = Taint(16)
    taint.mark(SLOTS, 3)
    taint.copy(slice(4, 8), slice(12, 16))
    assert taint.holds(torch.arange(12, 16), 3)
    taint.copy(slice(0, 4), slice(4, 8))
    assert taint.holds(SLOTS, 0)


def test_where_nobody_can_say_nobody_may_read() -> None:
    taint = Taint(16)
    taint.distrust()
    assert not taint.holds(torch.tensor([9]), 0)
    assert not taint.holds(torch.tensor([9]), 1)
    taint.mark(torch.tensor([9]), 0)
    assert taint.holds(torch.tensor([9]), 0)
