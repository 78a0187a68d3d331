"""The kernel for GPUs computes what the reference computes, seen without a GPU: in Triton's interpreter."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.engine.interpreter import find_triton
from guard.engine.kernels import FEW, WARM_UP
from guard.scores import SHORTEST
from tests.engine import triton_child as child

Found = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    with pool(interpret=True) as run:
        yield run


class pool:  # noqa: N801  (used as a function)
    """One process with Triton, in which functions of `triton_child` run."""

    def __init__(self, *, interpret: bool) -> None:
        begin = functools.partial(find_triton, interpret=interpret)
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin)

    def __enter__(self) -> Callable[..., Any]:
        return lambda function, *arguments: self._pool.submit(function, *arguments).result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def inputs(
    tokens: int,
    directions: int = 5,
    width: int = 96,
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
    capacity: int | None = None,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens * 1000 + directions)
    rows = torch.randn(2, tokens, width, generator=generator).to(dtype)
    units = torch.nn.functional.normalize(torch.randn(directions, width, generator=generator), dim=-1)
    return {
        "hidden": rows[0],
        "residual": rows[1] if residual else None,
        "directions": units,
        "every": directions // 2,
        "decisions": [row for row in range(tokens) if row % 3 == 2 or row == tokens - 1],
        "capacity": tokens if capacity is None else capacity,
    }


def both(run: Callable[..., Any], given: dict[str, Any]) -> tuple[Found, Found]:
    return run(child.read, "triton", given), run(child.read, "reference", given)


def assert_same(found: Found, expected: Found) -> None:
    for name in ("cosines", "full", "previous", "lengths"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found["count"].tolist() == expected["count"].tolist()


@pytest.mark.parametrize("tokens", [1, 2, FEW - 1, FEW, FEW + 1, 33, 70])
def test_any_number_of_tokens_is_read_as_the_reference_reads_it(interpreter: Callable[..., Any], tokens: int) -> None:
    assert_same(*both(interpreter, inputs(tokens)))


def test_the_warm_up_uses_every_kernel(interpreter: Callable[..., Any]) -> None:
    used = [interpreter(child.shape, tokens) for tokens in range(1, 3 * FEW)]
    assert {interpreter(child.shape, tokens) for tokens in WARM_UP} == set(used)
    assert len(set(used)) == 2


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("directions", [0, 1, 17, 40])
def test_any_number_of_directions_is_read(interpreter: Callable[..., Any], tokens: int, directions: int) -> None:
    found, expected = both(interpreter, inputs(tokens, directions))
    assert found["lengths"].min() > 1
    assert_same(found, expected)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("width", [1, 63, 200, 1030])
def test_any_width_of_the_residual_stream_is_read_whole(
    interpreter: Callable[..., Any], tokens: int, width: int
) -> None:
    assert_same(*both(interpreter, inputs(tokens, width=width)))


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_made_in_float32_whatever_the_model_computes_in(
    interpreter: Callable[..., Any], tokens: int, residual: bool, dtype: torch.dtype
) -> None:
    given = inputs(tokens, dtype=dtype, residual=residual)
    found, expected = both(interpreter, given)
    assert_same(found, expected)
    rows = (given["hidden"].double() + (given["residual"].double() if residual else 0))[given["decisions"]]
    standing = found["full"][0, : len(rows)].double()
    torch.testing.assert_close(standing, rows @ given["directions"].double().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 20])
def test_rows_behind_the_tokens_are_left_alone(interpreter: Callable[..., Any], tokens: int) -> None:
    found, expected = both(interpreter, inputs(tokens, capacity=tokens + 40))
    assert_same(found, expected)
    assert (found["cosines"][tokens:] == 7).all()
    assert (found["lengths"][tokens:] == 7).all()
    assert (found["full"][:, len(inputs(tokens)["decisions"]) :] == 7).all()


@pytest.mark.parametrize("tokens", [3, 20])
def test_rows_that_are_a_view_into_something_larger_are_read_where_they_are(
    interpreter: Callable[..., Any], tokens: int
) -> None:
    given = inputs(tokens, width=96)
    wide = torch.full((tokens, 2, 96), 9.0)
    wide[:, 1] = given["hidden"]
    flipped = given["residual"].T.contiguous().T
    assert_same(
        interpreter(child.read, "triton", {**given, "hidden": wide[:, 1], "residual": flipped}),
        interpreter(child.read, "reference", given),
    )


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["hidden", "residual"])
def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other(
    interpreter: Callable[..., Any], tokens: int, value: float, side: str
) -> None:
    clean = inputs(tokens, directions=17)
    given = {**clean, side: clean[side].clone()}
    given[side][1, 65] = value
    found, expected = both(interpreter, given)
    assert_same(found, expected)
    assert found["lengths"][1].isnan()
    assert found["cosines"][1].isnan().all()
    untouched = [row for row in range(tokens) if row != 1]
    alone = interpreter(child.read, "triton", clean)
    assert torch.equal(found["cosines"][untouched], alone["cosines"][untouched])
    assert torch.equal(found["lengths"][untouched], alone["lengths"][untouched])
    assert torch.equal(found["full"], alone["full"])


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("value", [1e20, 0.0, SHORTEST / 100, float("nan")])
def test_a_decision_whose_length_float32_cannot_hold_is_nan(
    interpreter: Callable[..., Any], tokens: int, value: float
) -> None:
    given = inputs(tokens)
    given["hidden"][-1], given["residual"][-1] = value, 0.0
    found, expected = both(interpreter, given)
    assert_same(found, expected)
    assert found["lengths"][tokens - 1].isnan()
    last = len(given["decisions"]) - 1
    assert found["full"][:, last].isnan().all()
    assert not found["full"][:, :last].isnan().any()


@pytest.mark.parametrize("decisions", [[], [0], list(range(200))])
def test_any_number_of_rows_decides(interpreter: Callable[..., Any], decisions: list[int]) -> None:
    """More than programs share them, too."""
    assert_same(*both(interpreter, {**inputs(200), "decisions": decisions}))


def test_a_decision_that_is_no_row_is_nan(interpreter: Callable[..., Any]) -> None:
    found = interpreter(child.read, "triton", {**inputs(5, capacity=8), "decisions": [0, 5, -1]})
    assert not found["full"][:, 0].isnan().any()
    assert found["full"][:, 1:3].isnan().all()


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernel_compiles_for_gpus_without_rounding_to_tf32(
    architecture: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    with pool(interpret=False) as run:
        for shape in ("decode", "prefill"):
            for element in ("*bf16", "*fp16", "*fp32"):
                ptx = run(child.compiled, architecture, shape, element)
                assert f".target sm_{architecture}" in ptx
                assert "fma.rn.f32" in ptx
                assert "mma" not in ptx
                # Once for the runs, once for the rows.
                assert ptx.count("atom.") == 2
        for element in ("*bf16", "*fp16", "*fp32"):
            for kernel in ("decide", "carry"):
                ptx = run(child.compiled_for_decisions, architecture, kernel, element)
                assert f".target sm_{architecture}" in ptx
                assert "mma" not in ptx
