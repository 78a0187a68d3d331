"""What runs in a process that imports Triton: pytest's own never does, and neither does the one that imports vLLM."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(sys.prefix) / "triton"
"""Where the set-up of the CPU build puts Triton; the CUDA build has it in its environment."""


def begin(*, interpret: bool) -> None:
    """Make Triton importable, as the interpreter of its kernels or as their compiler."""
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"no Triton in {FOLDER}: `make setup` installs it") from error


def read(name: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What an implementation of the op makes of these inputs: `hidden`, `residual`, `directions`, and a `capacity`
    that may be larger than the rows. Buffers begin as sevens, the count as zero."""
    from guard.engine.kernels import gpu, reference

    op = {"triton": gpu.read, "reference": reference.read}[name]
    directions, capacity = arguments["directions"], arguments["capacity"]
    found = {
        "projections": torch.full((capacity, len(directions)), 7.0),
        "lengths": torch.full((capacity,), 7.0),
        "count": torch.zeros(2, dtype=torch.int64),
    }
    with warnings.catch_warnings():
        # numpy, which the interpreter computes with, warns of the infinities that are in some rows on purpose.
        warnings.simplefilter("ignore", RuntimeWarning)
        op(arguments["hidden"], arguments["residual"], directions, **found)
    return found


def shape(tokens: int) -> tuple[object, ...]:
    """How the kernel cuts the work of so many tokens."""
    from guard.engine.kernels import gpu

    return astuple(gpu.shape_for(tokens))


def compiled(architecture: int, shape: str, element: str) -> str:
    """The PTX of the kernel for NVIDIA's `sm_` of this number, with 4096 wide rows of this element type; ptxas made a
    binary of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from guard.engine.kernels import gpu

    chosen = {"decode": gpu.DECODE, "prefill": gpu.PREFILL}[shape]
    constants = gpu.constants(chosen, width=4096, has_residual=True)
    pointers = {
        "hidden_ptr": element,
        "residual_ptr": element,
        "directions_ptr": "*fp32",
        "projections_ptr": "*fp32",
        "lengths_ptr": "*fp32",
        "count_ptr": "*i64",
    }
    numbers = dict.fromkeys(("tokens", "directions", "hidden_stride", "residual_stride"), "i32")
    source = ASTSource(
        gpu.read_kernel, {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": chosen.warps})
    assert made.asm["cubin"]
    ptx: str = made.asm["ptx"]
    return ptx
