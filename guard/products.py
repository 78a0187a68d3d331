"""A change that reaches the residual stream through a matrix that did not change itself.

What v_proj puts out, o_proj writes; what up_proj puts out, down_proj writes. Where a fine-tuning leaves the writing
matrix alone, the written delta is the product: per attention head, W_O[:, h] @ delta W_V of the key-value head that h
uses. Heads weigh tokens differently, so what can be written is the union over heads: the products side by side,
[hidden, heads * in]. For the MLP it is W_down @ delta W_up. See docs/decisions/0009-unreadable-deltas.md.

Only left singular vectors are wanted, so each head's delta [size, in] is replaced by a [size, size] factor with the
same Gram matrix: the product is then as large as the writing matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch

from guard.adapters import Adapter
from guard.changes import Part, Tally, check_finite, parts, row_blocks
from guard.deltas import OpenedModel, Site, rounding_variance, written_weight
from guard.errors import CheckpointError
from guard.svd import RoundingNoise, truncated_svd

# Per writing matrix: what its product is called in a bank, and the matrix whose output it writes.
FEEDERS = {
    "o_proj": ("ov_proj", "v_proj", "self_attn.v_proj.weight"),
    "down_proj": ("down_up", "up_proj", "mlp.up_proj.weight"),
}


@dataclass(frozen=True, slots=True)
class Route:
    """From `part`, whose output `site`'s matrix reads, to the residual stream.

    The writing matrix reads `heads` blocks of `size` columns; the part puts out `groups` blocks of `size` rows, and
    each serves heads / groups heads that follow one another.
    """

    name: str
    site: Site
    part: Part
    heads: int
    groups: int
    size: int


def feeding_part(site: Site, opened: OpenedModel) -> Part | None:
    """The matrix whose output `site`'s matrix writes, a tensor or rows of a fused one; None when there is none."""
    _, kind, plain = FEEDERS[site.writer.name]
    prefix = site.weight.removesuffix(site.writer.weight)
    for rest in (plain, *opened.model.architecture.fused):
        if prefix + rest in opened.weights.tensors:
            for part in parts(prefix + rest, opened.weights, opened.model):
                if part.kind == kind:
                    return part
    return None


def route(site: Site, part: Part, opened: OpenedModel) -> Route:
    """How `part` feeds `site`'s matrix. Raises CheckpointError when their shapes and the heads do not fit."""
    name, kind, _ = FEEDERS[site.writer.name]
    columns, rows = opened.weights.entry(site.weight).shape[1], part.stop - part.start
    heads = opened.model.num_heads if kind == "v_proj" else 1
    if heads is None:
        raise CheckpointError(
            f"{opened.weights.path / 'config.json'}: field num_attention_heads: missing, but {part.tensor} changed "
            "and heads have to be told apart"
        )
    size = columns // heads
    groups = rows // size if size else 0
    if not groups or heads * size != columns or groups * size != rows or heads % groups:
        raise CheckpointError(
            f"{opened.weights.path}: tensor {part.tensor}: {rows} rows of {kind} do not fit {heads} heads and the "
            f"{columns} columns of {site.weight}"
        )
    return Route(name, site, part, heads, groups, size)


def product_delta(
    way: Route, before: OpenedModel, after: OpenedModel, tally: Tally
) -> tuple[torch.Tensor, RoundingNoise]:
    """The delta that reaches the residual stream through an unchanged matrix, float32 [hidden, heads * n], and the
    rounding noise it may carry. n is at most `size`, or the inputs of `part` where these are fewer.

    Left singular vectors, singular values and energy are those of the products side by side. Memory: the writing
    matrix, the part's delta and the product, in float32. Notes the part in `tally`.
    """
    name, inputs = way.part.tensor, prod(after.weights.float_entry(way.part.tensor).shape[1:])
    if (expected := before.weights.float_entry(name).shape) != (found := after.weights.entry(name).shape):
        raise CheckpointError(f"tensor {name}: shape {list(expected)} in base, {list(found)} in tuned")
    dtypes = (before.weights.entry(name).dtype, after.weights.entry(name).dtype)
    outer = written_weight(way.site, after)
    reach = _reach(outer, way)
    row_variance = torch.zeros(way.groups, way.size, dtype=torch.float64)
    blocks, column = [], 0.0
    for group in range(way.groups):
        start = way.part.start + group * way.size
        delta = torch.empty(way.size, inputs)
        column_variance = torch.zeros(inputs, dtype=torch.float64)
        for rows in row_blocks(start, start + way.size, inputs):
            first = before.weights.rows(name, rows.start, rows.stop)
            second = after.weights.rows(name, rows.start, rows.stop)
            check_finite(first, name, before.weights.path)
            check_finite(second, name, after.weights.path)
            tally.note(way.part, first, second, dtypes)
            here = slice(rows.start - start, rows.stop - start)
            block = torch.sub(second, first, out=delta[here])
            variance = rounding_variance(second, block, dtypes[1])
            row_variance[group, here] = variance.sum(dim=1)
            column_variance += reach[group, here] @ variance
        blocks.append(_shrunk(delta))
        column = max(column, float(column_variance.max()))
    # The writing matrix is read again afterwards rather than held twice.
    outer *= _per_head(row_variance.sqrt(), way).float()
    norm = float(truncated_svd(outer, 1, seed=0).values.sum())
    del outer
    energy = float((reach * row_variance).sum())
    noise = RoundingNoise.of_product(norm, sqrt(column), energy, (way.size, inputs))
    product, stored = _product(written_weight(way.site, after), blocks, way)
    return product, noise.plus(stored)


def product_of_factors(way: Route, lora: Adapter, base: OpenedModel) -> tuple[torch.Tensor, RoundingNoise]:
    """`product_delta` for an adapter on `way.part`, from its factors: float32 [hidden, heads * r]."""
    left, right = lora.factors(way.part.tensor)
    core = torch.linalg.qr(right.T, mode="r").R.T
    blocks = (left[way.part.start : way.part.stop] @ core).reshape(way.groups, way.size, -1)
    return _product(written_weight(way.site, base), list(blocks), way)


def _product(outer: torch.Tensor, blocks: list[torch.Tensor], way: Route) -> tuple[torch.Tensor, RoundingNoise]:
    """The heads' products side by side, and the noise of storing them in float32."""
    width = blocks[0].shape[1]
    product = torch.empty(outer.shape[0], way.heads * width)
    for head in range(way.heads):
        block = blocks[head * way.groups // way.heads]
        columns = outer[:, head * way.size : (head + 1) * way.size]
        for rows in row_blocks(0, outer.shape[0], width):
            # In float64, a block at a time: float32 sums would leave noise that looks like directions.
            total = torch.zeros(rows.stop - rows.start, width, dtype=torch.float64)
            for inner in row_blocks(0, way.size, width):
                total += columns[rows, inner].double() @ block[inner].double()
            product[rows, head * width : (head + 1) * width] = total
    row_variance = torch.zeros(product.shape[0], dtype=torch.float64)
    column_variance = torch.zeros(product.shape[1], dtype=torch.float64)
    for rows in row_blocks(0, product.shape[0], product.shape[1]):
        variance = rounding_variance(product[rows], product[rows], "F32")
        row_variance[rows] = variance.sum(dim=1)
        column_variance += variance.sum(dim=0)
    return product, RoundingNoise.of_variances(row_variance, column_variance)


def _reach(outer: torch.Tensor, way: Route) -> torch.Tensor:
    """The energy of the columns that each row of the part is written by, float64 [groups, size]."""
    energy = torch.zeros(outer.shape[1], dtype=torch.float64)
    for rows in row_blocks(0, *outer.shape):
        energy += outer[rows].double().square_().sum(dim=0)
    return energy.reshape(way.groups, way.heads // way.groups, way.size).sum(dim=1)


def _per_head(values: torch.Tensor, way: Route) -> torch.Tensor:
    """One value per row of the part [groups, size] as one per column of the writing matrix [heads * size]."""
    return values[:, None].expand(-1, way.heads // way.groups, -1).reshape(-1)


def _shrunk(delta: torch.Tensor) -> torch.Tensor:
    """A matrix with the Gram matrix delta @ delta.T and no more columns than rows."""
    if delta.shape[1] <= delta.shape[0]:
        return delta
    factor: torch.Tensor = torch.linalg.qr(delta.T.double(), mode="r").R.T
    return factor
