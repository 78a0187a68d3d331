"""The overlap of directions: planted angles come back, and `bank inspect` shows them."""

from __future__ import annotations

from math import cos, sin
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.directions import build_bank
from guard.subspaces import overlap
from server import cli

from .planted import HEADS, HIDDEN, INNER, base_tensors, changed, down_proj, low_rank, o_proj, write_model


def test_planted_angles_are_found() -> None:
    one = np.eye(2, 10, dtype=np.float32)
    other = np.zeros((3, 10), dtype=np.float32)
    other[0, 0], other[0, 5] = cos(0.3), sin(0.3)
    other[1, 1], other[1, 6] = cos(1.2), sin(1.2)
    other[2, 9] = 1.0

    found = overlap(one, other)

    assert found.largest == pytest.approx(cos(0.3) ** 2, rel=1e-6)
    assert found.mean == pytest.approx((cos(0.3) ** 2 + cos(1.2) ** 2) / 2, rel=1e-6)
    assert found.chance == pytest.approx(0.3)
    assert overlap(other, one) == found


def test_rows_that_say_the_same_twice_count_once() -> None:
    one = np.eye(2, 10, dtype=np.float32)[[0, 0, 1]]
    assert overlap(one, np.eye(2, 10, dtype=np.float32)).mean == pytest.approx(1.0)
    assert overlap(one, np.eye(2, 10, dtype=np.float32)).chance == pytest.approx(0.2)


def test_the_mean_of_random_subspaces_is_what_chance_says() -> None:
    random = np.random.default_rng(0)
    found = [overlap(*random.standard_normal((2, 12, 60)).astype(np.float32)) for _ in range(40)]
    assert np.mean([one.mean for one in found]) == pytest.approx(found[0].chance, rel=0.1)


def test_inspect_shows_what_two_matrices_and_two_layers_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.bank",))
    shared = torch.linalg.qr(torch.randn(HIDDEN, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    deltas = {}
    for matrix, columns, kept in (
        (o_proj(0), HEADS, [0, 1]),
        (down_proj(0), INNER, [1, 2]),
        (down_proj(1), INNER, [3]),
    ):
        right = low_rank(columns, len(kept), [1.0] * len(kept), seed=2).T
        deltas[matrix] = shared[:, kept] @ right
    base = base_tensors()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", changed(base, deltas))
    build_bank(tmp_path / "base", tmp_path / "tuned").save(tmp_path / "out.bank")

    assert cli.main(["bank", "inspect", str(tmp_path / "out.bank")]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Two directions of each matrix, one of them the same; three in all, and nothing in common with layer 1.
    assert ["0", "1.000", "0.500", "0.031", "0.000", "0.000", "0.047"] in rows
