"""The op as one Triton kernel: the residual stream is read once and nothing of its size is written.

Checked without a GPU: against `reference.py` in Triton's interpreter, and compiled for NVIDIA's sm_80 and sm_90. It has
not run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from guard.engine.kernels import FEW


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut into programs."""

    tokens: int
    directions: int
    width: int
    """Of the residual stream that is in registers at once."""
    dot: bool
    """Whether tokens times directions goes to `tl.dot`, whose blocks are at least 16 by 16."""
    warps: int


DECODE = Shape(tokens=1, directions=2, width=1024, dot=False, warps=4)
PREFILL = Shape(tokens=32, directions=16, width=64, dot=True, warps=4)


def shape_for(tokens: int) -> Shape:
    """How T tokens are read. A shape is compiled when it is first used."""
    return DECODE if tokens < FEW else PREFILL


@triton.jit(do_not_specialize=["tokens", "directions"])
def read_kernel(
    hidden_ptr,  # [tokens, width], any float
    residual_ptr,  # as hidden; not read where there is none
    directions_ptr,  # float32 [directions, width]
    projections_ptr,  # float32 [at least tokens, directions]
    lengths_ptr,  # float32 [at least tokens]
    count_ptr,  # int64 [2]
    tokens,
    directions,
    hidden_stride,
    residual_stride,
    width: tl.constexpr,
    has_residual: tl.constexpr,
    block_tokens: tl.constexpr,
    block_directions: tl.constexpr,
    block_width: tl.constexpr,
    dot: tl.constexpr,
):
    first, second = tl.program_id(0), tl.program_id(1)
    rows = first.to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    places = second * block_directions + tl.arange(0, block_directions)
    inside, known = rows < tokens, places < directions
    squares = tl.zeros([block_tokens], tl.float32)
    products = tl.zeros([block_tokens, block_directions], tl.float32)
    for start in range(0, width, block_width):
        columns = start + tl.arange(0, block_width)
        whole = columns < width
        here = inside[:, None] & whole[None, :]
        block = tl.load(hidden_ptr + rows[:, None] * hidden_stride + columns[None, :], mask=here, other=0.0)
        block = block.to(tl.float32)
        if has_residual:
            carried = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=here, other=0.0)
            block += carried.to(tl.float32)
        squares += tl.sum(block * block, axis=1)
        units = tl.load(
            directions_ptr + places[:, None] * width + columns[None, :],
            mask=known[:, None] & whole[None, :],
            other=0.0,
        )
        if dot:
            # Not TF32, whose 10 bits would be most of what a cosine's threshold has to tell apart.
            products = tl.dot(block, tl.trans(units), products, input_precision="ieee")
        else:
            products += tl.sum(block[:, None, :] * units[None, :, :], axis=2)
    out = projections_ptr + rows[:, None] * directions + places[None, :]
    tl.store(out, products, mask=inside[:, None] & known[None, :])
    if second == 0:
        tl.store(lengths_ptr + rows, tl.sqrt(squares), mask=inside)
        if first == 0:
            # Counted where the work is done: a kernel that a graph left out does not count.
            tl.atomic_add(count_ptr, 1)
            tl.atomic_add(count_ptr + 1, tokens)


def constants(shape: Shape, *, width: int, has_residual: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "width": width,
        "has_residual": has_residual,
        "block_tokens": shape.tokens,
        "block_directions": shape.directions,
        "block_width": min(shape.width, triton.next_power_of_2(width)),
        "dot": shape.dot,
    }


def read(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    projections: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """As `reference.read`; directions, projections, lengths and count contiguous."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    carried = hidden if residual is None else residual if residual.stride(1) == 1 else residual.contiguous()
    tokens, width = hidden.shape
    every = len(directions)
    shape = shape_for(tokens)
    # At least one program reads the lengths, also where there are no directions.
    grid = (triton.cdiv(tokens, shape.tokens), max(1, triton.cdiv(every, shape.directions)))
    read_kernel[grid](
        hidden,
        carried,
        directions,
        projections,
        lengths,
        count,
        tokens,
        every,
        hidden.stride(0),
        carried.stride(0),
        **constants(shape, width=width, has_residual=residual is not None),
        num_warps=shape.warps,
    )
