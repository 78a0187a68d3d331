"""`read` as Triton kernels: the residual stream is read once for all rows, and once more for those that decide.

Checked without a GPU: against `reference.py` in Triton's interpreter, and compiled for NVIDIA's sm_80 and sm_90. It has
not run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from guard.engine.kernels import FEW
from guard.scores import SHORTEST


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


PROGRAMS = 64
"""That share the rows that decide, however many these are: only the device knows."""


@triton.jit
def known_length(squares, shortest: tl.constexpr):
    """A length, NaN where float32 cannot hold it."""
    length = tl.sqrt(squares)
    return tl.where((length > shortest) & (length < float("inf")), length, float("nan"))


@triton.jit(do_not_specialize=["tokens", "directions"])
def read_kernel(
    hidden_ptr,  # [tokens, width], any float
    residual_ptr,  # as hidden; not read where there is none
    directions_ptr,  # float32 [at least directions, width]
    cosines_ptr,  # float32 [at least tokens, directions]
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
    shortest: tl.constexpr,
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
    lengths = known_length(squares, shortest)
    out = cosines_ptr + rows[:, None] * directions + places[None, :]
    tl.store(out, products / lengths[:, None], mask=inside[:, None] & known[None, :])
    if second == 0:
        tl.store(lengths_ptr + rows, lengths, mask=inside)
        if first == 0:
            # Counted where the work is done: a kernel that a graph left out does not count.
            tl.atomic_add(count_ptr, 1)
            tl.atomic_add(count_ptr + 1, tokens)


@triton.jit(do_not_specialize=["tokens", "directions", "capacity"])
def decide_kernel(
    hidden_ptr,  # [tokens, width], any float
    residual_ptr,  # as hidden; not read where there is none
    directions_ptr,  # float32 [directions, width]
    decisions_ptr,  # int64: how many, then the rows
    previous_ptr,  # float32 [capacity, width]
    full_ptr,  # float32 [2, capacity, directions]
    lengths_ptr,  # float32 [at least tokens], of this place
    tokens,
    directions,
    capacity,
    hidden_stride,
    residual_stride,
    width: tl.constexpr,
    has_residual: tl.constexpr,
    block_directions: tl.constexpr,
    block_width: tl.constexpr,
):
    places = tl.program_id(1) * block_directions + tl.arange(0, block_directions)
    known = places < directions
    deciding = tl.load(decisions_ptr)
    for at in range(tl.program_id(0), deciding, tl.num_programs(0)):
        row = tl.load(decisions_ptr + 1 + at)
        there = (row >= 0) & (row < tokens)
        stands = tl.zeros([block_directions], tl.float32)
        wrote = tl.zeros([block_directions], tl.float32)
        for start in range(0, width, block_width):
            columns = start + tl.arange(0, block_width)
            whole = columns < width
            here = whole & there
            block = tl.load(hidden_ptr + row * hidden_stride + columns, mask=here, other=0.0).to(tl.float32)
            if has_residual:
                block += tl.load(residual_ptr + row * residual_stride + columns, mask=here, other=0.0).to(tl.float32)
            change = block - tl.load(previous_ptr + tl.cast(at, tl.int64) * width + columns, mask=whole, other=0.0)
            units = tl.load(
                directions_ptr + places[:, None] * width + columns[None, :],
                mask=known[:, None] & whole[None, :],
                other=0.0,
            )
            stands += tl.sum(block[None, :] * units, axis=1)
            wrote += tl.sum(change[None, :] * units, axis=1)
        # NaN where the length is, and where the row does not exist: such a decision cannot be scored.
        length = tl.load(lengths_ptr + row, mask=there, other=float("nan"))
        out = tl.cast(at, tl.int64) * directions + places
        tl.store(full_ptr + out, stands * (length / length), mask=known)
        tl.store(full_ptr + tl.cast(capacity, tl.int64) * directions + out, wrote * (length / length), mask=known)


@triton.jit(do_not_specialize=["tokens"])
def carry_kernel(
    hidden_ptr,
    residual_ptr,
    decisions_ptr,
    previous_ptr,
    tokens,
    hidden_stride,
    residual_stride,
    width: tl.constexpr,
    has_residual: tl.constexpr,
    block_width: tl.constexpr,
):
    columns = tl.program_id(1) * block_width + tl.arange(0, block_width)
    for at in range(tl.program_id(0), tl.load(decisions_ptr), tl.num_programs(0)):
        row = tl.load(decisions_ptr + 1 + at)
        here = (columns < width) & (row >= 0) & (row < tokens)
        block = tl.load(hidden_ptr + row * hidden_stride + columns, mask=here, other=0.0).to(tl.float32)
        if has_residual:
            block += tl.load(residual_ptr + row * residual_stride + columns, mask=here, other=0.0).to(tl.float32)
        tl.store(previous_ptr + tl.cast(at, tl.int64) * width + columns, block, mask=columns < width)


def constants(shape: Shape, *, width: int, has_residual: bool) -> dict[str, int | bool | float]:
    """What the kernel is compiled for."""
    return {
        "width": width,
        "has_residual": has_residual,
        "block_tokens": shape.tokens,
        "block_directions": shape.directions,
        "block_width": min(shape.width, triton.next_power_of_2(width)),
        "dot": shape.dot,
        "shortest": SHORTEST,
    }


DECIDE_DIRECTIONS, DECIDE_WIDTH = 4, 1024
"""The block of directions and of the residual stream that a program of `decide_kernel` holds."""


def read(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    decisions: torch.Tensor,
    previous: torch.Tensor,
    cosines: torch.Tensor,
    full: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """As `reference.read`; all but hidden and residual contiguous. A decision that is no row is NaN."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    carried = hidden if residual is None else residual if residual.stride(1) == 1 else residual.contiguous()
    tokens, width = hidden.shape
    every, capacity = cosines.shape[1], len(previous)
    shape = shape_for(tokens)
    strides = hidden.stride(0), carried.stride(0)
    # At least one program reads the lengths, also where there are no directions.
    read_kernel[(triton.cdiv(tokens, shape.tokens), max(1, triton.cdiv(every, shape.directions)))](
        hidden,
        carried,
        directions,
        cosines,
        lengths,
        count,
        tokens,
        every,
        *strides,
        **constants(shape, width=width, has_residual=residual is not None),
        num_warps=shape.warps,
    )
    block = min(DECIDE_WIDTH, triton.next_power_of_2(width))
    if len(directions):
        decide_kernel[(PROGRAMS, triton.cdiv(len(directions), DECIDE_DIRECTIONS))](
            hidden,
            carried,
            directions,
            decisions,
            previous,
            full,
            lengths,
            tokens,
            len(directions),
            capacity,
            *strides,
            width=width,
            has_residual=residual is not None,
            block_directions=DECIDE_DIRECTIONS,
            block_width=block,
        )
    # After all that read what was there: kernels of one stream run one after another.
    carry_kernel[(PROGRAMS, triton.cdiv(width, block))](
        hidden,
        carried,
        decisions,
        previous,
        tokens,
        *strides,
        width=width,
        has_residual=residual is not None,
        block_width=block,
    )
