"""What runs in a process that imports Triton: pytest's own never does, and neither does the one that imports vLLM."""

from __future__ import annotations

import warnings
from dataclasses import astuple
from typing import Any

import torch


def read(name: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What an implementation of the op makes of these inputs: `hidden`, `residual`, `directions`, how many of these
    are read at `every` token, `decisions`, and a `capacity` that may be larger than the rows. Buffers begin as sevens,
    the count as zero."""
    from guard.engine.kernels import gpu, reference

    op = {"triton": gpu.read, "reference": reference.read}[name]
    directions, capacity = arguments["directions"], arguments["capacity"]
    rows = arguments["decisions"]
    decisions = torch.zeros(capacity + 1, dtype=torch.int64)
    decisions[: len(rows) + 1] = torch.tensor([len(rows), *rows])
    found = {
        "previous": torch.full((capacity, directions.shape[1]), 7.0),
        "cosines": torch.full((capacity, arguments["every"]), 7.0),
        "full": torch.full((2, capacity, len(directions)), 7.0),
        "lengths": torch.full((capacity, 1), 7.0),
        "count": torch.zeros(2, dtype=torch.int64),
    }
    with warnings.catch_warnings():
        # numpy, which the interpreter computes with, warns of the infinities that are in some rows on purpose.
        warnings.simplefilter("ignore", RuntimeWarning)
        op(arguments["hidden"], arguments["residual"], directions, decisions, **found)
    return found


def shape(tokens: int) -> tuple[object, ...]:
    """How the kernel cuts the work of so many tokens."""
    from guard.engine.kernels import gpu

    return astuple(gpu.shape_for(tokens))


def compiled(architecture: int, shape: str, element: str) -> str:
    """The PTX of the kernel for NVIDIA's `sm_` of this number, with 4096 wide rows of this element type; ptxas made a
    binary of it."""
    from guard.engine.kernels import gpu

    chosen = {"decode": gpu.DECODE, "prefill": gpu.PREFILL}[shape]
    pointers = {"directions_ptr": "*fp32", "cosines_ptr": "*fp32", "lengths_ptr": "*fp32", "count_ptr": "*i64"}
    numbers = ("tokens", "directions", "hidden_stride", "residual_stride")
    constants = gpu.constants(chosen, width=4096, has_residual=True)
    return _ptx(gpu.read_kernel, architecture, element, pointers, numbers, constants, chosen.warps)


def compiled_for_decisions(architecture: int, kernel: str, element: str) -> str:
    """The same of `decide_kernel` or `carry_kernel`."""
    from guard.engine.kernels import gpu

    pointers = {"decisions_ptr": "*i64", "previous_ptr": "*fp32"}
    numbers: tuple[str, ...] = ("tokens", "hidden_stride", "residual_stride")
    constants: dict[str, Any] = {"width": 4096, "has_residual": True, "block_width": gpu.DECIDE_WIDTH}
    if kernel == "carry":
        return _ptx(gpu.carry_kernel, architecture, element, pointers, numbers, constants)
    pointers |= {"directions_ptr": "*fp32", "full_ptr": "*fp32", "lengths_ptr": "*fp32"}
    numbers = (*numbers, "directions", "capacity")
    constants["block_directions"] = gpu.DECIDE_DIRECTIONS
    return _ptx(gpu.decide_kernel, architecture, element, pointers, numbers, constants)


def _ptx(
    kernel: Any,
    architecture: int,
    element: str,
    pointers: dict[str, str],
    numbers: tuple[str, ...],
    constants: dict[str, Any],
    warps: int = 4,
) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"hidden_ptr": element, "residual_ptr": element, **pointers, **dict.fromkeys(numbers, "i32")}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    ptx: str = made.asm["ptx"]
    return ptx
