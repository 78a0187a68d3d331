"""What fine-tuning changed in the matrices that write to the residual stream, as it arrives there.

Where a norm with weight g follows the matrix (Gemma 2 and 3, OLMo 2), the residual stream receives g * (W x) up to a
positive factor per token, so the delta that is decomposed is diag(g) delta W, with g of the tuned model. The paper's
models have no such norm; for them this is delta W itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import torch

from guard.architectures import Model, Writer, read_model
from guard.changes import Part, Tally, check_finite, row_blocks
from guard.checkpoints import FLOAT_DTYPES, Checkpoint, StrPath
from guard.errors import CheckpointError
from guard.svd import RoundingNoise

# Variance of the error of rounding w, over (eps w)^2: the spacing's square over 12, and the mean of (spacing / eps w)^2
# over mantissas that are spread evenly on a log scale, which is 3 / (8 ln 2).
ULP_VARIANCE = 3.0 / (8.0 * log(2.0)) / 12.0

# How often a delta itself was rounded to float32: product, scaling and sum of whoever merged it, and the subtraction
# here. It shows only where the weights are stored in float32.
FLOAT32_ROUNDINGS = 4


@dataclass(frozen=True, slots=True)
class Site:
    """One residual-writing matrix of one layer, by its full tensor names."""

    layer: int
    writer: Writer
    weight: str
    norm: str | None

    def part(self, opened: OpenedModel) -> Part:
        """The whole matrix, as the tally of changes counts it."""
        return Part(self.weight, self.writer.name, 0, opened.weights.entry(self.weight).shape[0])


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model folder whose headers and configuration were read."""

    weights: Checkpoint
    model: Model


def open_model(folder: StrPath) -> OpenedModel:
    """Open a model folder. Raises CheckpointError, and UnsupportedModelError for a class outside the table."""
    weights = Checkpoint.open(folder)
    return OpenedModel(weights, read_model(weights.config(), weights.path))


def check_pair(before: OpenedModel, after: OpenedModel) -> None:
    """Raise CheckpointError unless both are the same class in the same sizes, in two folders."""
    base, tuned = before.weights.path, after.weights.path
    if base.samefile(tuned):
        raise CheckpointError(f"base and tuned are the same folder, {base}: there is no delta")
    for what in ("model_class", "hidden_size", "num_layers"):
        expected, found = getattr(before.model, what), getattr(after.model, what)
        if expected != found:
            raise CheckpointError(f"{tuned}: {what} is {found}, but {expected} in {base}: not the same architecture")


def writing_sites(opened: OpenedModel) -> list[Site]:
    """Every residual-writing matrix that the model's configuration promises, by layer."""
    sites = []
    for index in range(opened.model.num_layers):
        prefix = opened.model.layer_prefix(index, opened.weights.tensors)
        for writer in opened.model.architecture.writers:
            norm = None if writer.norm is None else prefix + writer.norm
            sites.append(Site(index, writer, prefix + writer.weight, norm))
    return sites


def check_site(site: Site, before: OpenedModel, after: OpenedModel) -> None:
    """Raise CheckpointError unless the matrix is in both, in the same shape, and fits the hidden size."""
    for name in (site.weight, site.norm):
        if name is not None:
            expected, found = before.weights.entry(name).shape, after.weights.entry(name).shape
            if expected != found:
                raise CheckpointError(f"tensor {name}: shape {list(expected)} in base, {list(found)} in tuned")
    check_rows(site, before)
    check_rows(site, after)


def check_rows(site: Site, opened: OpenedModel) -> None:
    """Raise CheckpointError unless the matrix is there, of floats, and has hidden_size rows."""
    shape, hidden = opened.weights.float_entry(site.weight).shape, opened.model.hidden_size
    if len(shape) != 2 or shape[0] != hidden or not shape[1]:
        raise CheckpointError(
            f"{opened.weights.path}: tensor {site.weight}: shape {list(shape)}, expected [{hidden}, inputs] "
            "as hidden_size in config.json says"
        )
    if site.norm is not None and (norm := opened.weights.float_entry(site.norm).shape) != (hidden,):
        raise CheckpointError(f"{opened.weights.path}: tensor {site.norm}: shape {list(norm)}, expected [{hidden}]")


def written_gain(site: Site, opened: OpenedModel) -> torch.Tensor | None:
    """What the norm after the matrix multiplies each residual component by, float32 [hidden]; None without a norm."""
    if site.norm is None:
        return None
    gain = opened.weights.read(site.norm) + opened.model.architecture.norm_offset
    check_finite(gain, site.norm, opened.weights.path)
    return gain


def written_weight(site: Site, opened: OpenedModel) -> torch.Tensor:
    """The whole matrix as it writes to the residual stream: behind the norm's gain, float32 [hidden, in]."""
    weight = opened.weights.read(site.weight)
    check_finite(weight, site.weight, opened.weights.path)
    gain = written_gain(site, opened)
    if gain is not None:
        weight *= gain[:, None]
    return weight


def written_delta(
    site: Site, before: OpenedModel, after: OpenedModel, tally: Tally | None = None
) -> tuple[torch.Tensor, RoundingNoise]:
    """The delta as it reaches the residual stream, float32 [hidden, in], and the rounding noise it may carry.

    Noise is that of storing the tuned weights: fine-tuning started from the base as it is stored. Raises
    CheckpointError, naming the tensor, for NaN or infinity. Beside the delta, memory holds a few blocks of rows. Notes
    the matrix in `tally`, without the gain.
    """
    rows, columns = after.weights.entry(site.weight).shape
    dtypes = (before.weights.entry(site.weight).dtype, after.weights.entry(site.weight).dtype)
    gain = written_gain(site, after)
    delta = torch.empty(rows, columns)
    row_variance = torch.zeros(rows, dtype=torch.float64)
    column_variance = torch.zeros(columns, dtype=torch.float64)
    for part in row_blocks(0, rows, columns):
        first = before.weights.rows(site.weight, part.start, part.stop)
        second = after.weights.rows(site.weight, part.start, part.stop)
        check_finite(first, site.weight, before.weights.path)
        check_finite(second, site.weight, after.weights.path)
        if tally is not None:
            tally.note(site.part(after), first, second, dtypes)
        block = torch.sub(second, first, out=delta[part])
        variance = rounding_variance(second, block, dtypes[1])
        if gain is not None:
            block *= gain[part, None]
            variance *= gain[part, None].double().square()
        check_finite(block, site.weight, after.weights.path)
        row_variance[part] = variance.sum(dim=1)
        column_variance += variance.sum(dim=0)
    return delta, RoundingNoise.of_variances(row_variance, column_variance)


def rounding_variance(tuned: torch.Tensor, delta: torch.Tensor, dtype: str) -> torch.Tensor:
    """The variance, float64, of each entry of `delta` by storing `tuned` in `dtype` and computing in float32."""
    stored, computed = _eps(dtype), sqrt(FLOAT32_ROUNDINGS) * _eps("F32")
    return ((tuned.double() * stored).square_() + (delta.double() * computed).square_()).mul_(ULP_VARIANCE)


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, FLOAT_DTYPES[dtype])).eps
