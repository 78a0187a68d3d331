"""Every kernel computes what plain torch does, in every shape and for whatever a residual can hold; and where none can
be compiled, plain torch serves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.engine.kernels import native, ops, reference
from guard.scores import SHORTEST

CAPACITY = 200


@dataclass(frozen=True)
class Place:
    """What `read` takes, and writes into."""

    hidden: torch.Tensor
    residual: torch.Tensor | None
    directions: torch.Tensor
    decisions: torch.Tensor
    previous: torch.Tensor
    cosines: torch.Tensor
    full: torch.Tensor
    lengths: torch.Tensor
    count: torch.Tensor

    def read_by(self, kernel: Any) -> Place:
        """A copy, read."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {name: value.clone() for name, value in fields.items() if value is not None and name != "hidden"}
        kernel(*fields.values())
        return Place(**fields)


def place(
    tokens: int, deciding: list[int], hidden: int = 70, k: int = 7, every: int = 3, dtype: torch.dtype = torch.float32
) -> Place:
    source = torch.Generator().manual_seed(tokens * 1000 + hidden)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    decisions = torch.zeros(CAPACITY + 1, dtype=torch.int64)
    decisions[: len(deciding) + 1] = torch.tensor([len(deciding), *deciding])
    return Place(
        random(tokens, hidden).to(dtype),
        random(tokens, hidden).to(dtype),
        random(k, hidden),
        decisions,
        random(CAPACITY, hidden),
        torch.full((CAPACITY, every), 55.0),
        torch.full((2, CAPACITY, k), 55.0),
        torch.full((CAPACITY, 1), 55.0),
        torch.tensor([4, 100]),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """They were: a machine without a C++ compiler cannot run vLLM's own compiled models either."""
    assert ops.install() == "compiled"


def agree(some: Place) -> tuple[Place, Place]:
    ours, theirs = some.read_by(torch.ops.undertow.read), some.read_by(reference.read)
    for name in ("previous", "cosines", "full", "lengths"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.equal(ours.count, theirs.count)
    return ours, theirs


DECIDING = {
    "none": (90, []),
    "one row": (1, [0]),
    "decode": (4, [0, 1, 2, 3]),
    "decode of many": (65, list(range(65))),
    "the last of a chunk": (130, [129]),
    "some": (150, [0, 63, 64, 149]),
    "nothing decodes in a row": (1, []),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECIDING)
def test_reading_agrees(name: str, dtype: torch.dtype) -> None:
    some = place(*DECIDING[name], dtype=dtype)
    ours, _ = agree(some)
    rows, deciding = DECIDING[name]
    assert ours.count.tolist() == [5, 100 + rows]
    # Nothing is written beyond the rows there are, or the decisions there are.
    assert (ours.cosines[rows:] == 55).all()
    assert (ours.full[:, len(deciding) :] == 55).all()


@pytest.mark.parametrize(("hidden", "k", "every"), [(1, 1, 1), (33, 5, 5), (64, 9, 0), (256, 0, 0), (1000, 130, 65)])
@pytest.mark.parametrize("name", ["decode", "some"])
def test_reading_agrees_at_any_width(hidden: int, k: int, every: int, name: str) -> None:
    agree(place(*DECIDING[name], hidden=hidden, k=k, every=every))


def test_reading_agrees_where_there_is_no_second_half_and_where_rows_are_strided() -> None:
    some = place(*DECIDING["some"])
    agree(replace(some, residual=None))
    wide = torch.randn(150, 140)
    agree(replace(some, hidden=wide[:, ::2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, SHORTEST / 100, 3e38])
@pytest.mark.parametrize("name", ["decode", "some"])
def test_a_row_that_cannot_be_scored_is_nan_and_its_neighbours_are_not(bad: float, name: str) -> None:
    rows, deciding = DECIDING[name]
    for row in (deciding[1], 1):
        some = place(rows, deciding)
        assert some.residual is not None
        some.hidden[row], some.residual[row] = bad, 0.0
        ours, _ = agree(some)
        assert ours.cosines[row].isnan().all()
        assert ours.lengths[row].isnan().all()
        others = [other for other in range(rows) if other != row]
        assert not ours.cosines[others].isnan().any()
        if row in deciding:
            assert ours.full[:, deciding.index(row)].isnan().all()
        assert not ours.full[:, [index for index, other in enumerate(deciding) if other != row]].isnan().any()


@pytest.mark.parametrize("row", [-1, 4, 1000])
def test_a_decision_that_is_no_row_is_an_error(row: int) -> None:
    some = place(4, [0, row])
    with pytest.raises(RuntimeError, match=f"decision row {row} of 4 rows"):
        some.read_by(torch.ops.undertow.read)


def test_what_was_written_is_since_the_last_place() -> None:
    first, second = place(150, [3, 149]), place(150, [3, 149], k=4)
    moved = first.read_by(torch.ops.undertow.read)
    ours = replace(second, previous=moved.previous, residual=None, hidden=first.hidden * 2).read_by(
        torch.ops.undertow.read
    )
    assert first.residual is not None
    change = (first.hidden - first.residual)[[3, 149]]
    torch.testing.assert_close(ours.full[1, :2], change @ second.directions.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 3, 300])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 500])
def test_the_worst_coordinate_agrees(tokens: int, width: int) -> None:
    source = torch.Generator().manual_seed(tokens + width)
    cosines = torch.randn(tokens, width, generator=source)
    low = -torch.rand(3, width, generator=source)
    high = torch.rand(3, width, generator=source)
    # Ties, ranges that nothing lies in, and what cannot be scored, wherever it stands.
    cosines[::7] = 0.0
    low[1], high[1] = math.inf, -math.inf
    if tokens > 200:
        cosines[5], cosines[6, width // 2], cosines[8, -1] = math.nan, math.nan, math.nan
        cosines[9, 0], cosines[10, -1] = math.inf, -math.inf
    for ours, theirs in zip(
        torch.ops.undertow.worst(cosines, low, high), reference.worst(cosines, low, high), strict=True
    ):
        assert torch.equal(
            ours.nan_to_num(nan=-7.0, posinf=8.0, neginf=-8.0), theirs.nan_to_num(nan=-7.0, posinf=8.0, neginf=-8.0)
        )


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 8, 9, 40])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 300, 1000])
def test_distances_agree_with_float64(tokens: int, size: int) -> None:
    source = torch.Generator().manual_seed(size)
    factor = torch.randn(size, size, generator=source).triu()
    rows = torch.randn(tokens, size, generator=source)
    panels = [factor[: start + 64, start : start + 64].contiguous() for start in range(0, size, 64)]
    expected = (rows.double() @ factor.double()).square().sum(dim=-1)
    for kernel in (torch.ops.undertow.squares, reference.squares):
        torch.testing.assert_close(kernel(rows, panels).double(), expected, rtol=1e-5, atol=1e-5)
    rows[0, -1] = math.nan
    assert torch.ops.undertow.squares(rows, panels).isnan().tolist() == [row == 0 for row in range(tokens)]


def test_gathering_agrees() -> None:
    parts = [torch.randn(9, width) for width in (3, 0, 1)] + [torch.randn(2, 9, 4)[1]]
    for rows in (0, 1, 9):
        assert torch.equal(torch.ops.undertow.gather(parts, rows), reference.gather(parts, rows))


# -- where they come from ---------------------------------------------------------------------------------------------


def test_they_are_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_keywords: object) -> None:
        calls.append(command)
        Path(command[-1]).write_bytes(b"made")

    monkeypatch.setattr(native.subprocess, "run", run)
    first = native.library(tmp_path)
    assert first is not None
    assert first.read_bytes() == b"made"
    assert native.library(tmp_path) == first
    assert len(calls) == 1
    # Another compiler, processor, torch or source is another library.
    monkeypatch.setattr(native, "_processor", lambda: ["flags : other"])
    assert native.library(tmp_path) not in (None, first)
    assert len(calls) == 2
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cpu.cpp"
    broken.write_text("this is no C++;\n")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(native.subprocess.CalledProcessError) as failed:
        native.library(tmp_path)
    assert b"error" in failed.value.stderr
    assert list((tmp_path / "kernels").iterdir()) == []


def test_without_a_compiler_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.library(tmp_path) is None


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C++ compiler was found"), ("false", "exit code 1")]
)
def test_plain_torch_serves_where_nothing_could_be_compiled(tmp_path: Path, compiler: str, reason: str) -> None:
    """In a process of its own: ops are given their kernels once."""
    import os
    import subprocess
    import sys

    script = (
        "import torch\n"
        "from guard.engine.kernels import ops, reference\n"
        "print(ops.install())\n"
        "some = torch.randn(5, 3), torch.zeros(3, 3), torch.zeros(3, 3)\n"
        "assert torch.equal(torch.ops.undertow.worst(*some)[0], reference.worst(*some)[0])\n"
    )
    environment = {**os.environ, "CXX": compiler, "UNDERTOW_CACHE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"plain torch: {reason}\n"), ran.stderr
