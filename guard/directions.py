"""Weight delta -> left singular vectors -> Bank, one matrix at a time.

"Watch the Weights" (arXiv 2508.00161, section 3): what fine-tuning writes to the residual stream lies along the left
singular vectors of delta W = W_tuned - W_base of `self_attn.o_proj` and `mlp.down_proj`. For each layer and matrix the
top k are kept.

    bank = build_bank("models/base", "models/tuned", k=20)
    bank.save("tuned.bank")

Memory: one float32 copy of the delta at a time; both weights stream past it in blocks of rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path

import torch
from tqdm import tqdm

from guard.adapters import Adapter
from guard.architectures import Model, Writer, read_model
from guard.bank import Bank, LayerBank, orient
from guard.checkpoints import Checkpoint, Progress
from guard.errors import BankError, CheckpointError
from guard.fingerprint import MatrixEnergy
from guard.svd import RoundingNoise, Spectrum, empty_spectrum, numerical_rank, truncated_svd

METHOD = "delta-svd"
DEFAULT_K = 20
BLOCK_BYTES = 16 << 20

# Variance of the error of rounding w, over (eps w)^2: the spacing's square over 12, and the mean of (spacing / eps w)^2
# over mantissas that are spread evenly on a log scale, which is 3 / (8 ln 2).
ULP_VARIANCE = 3.0 / (8.0 * log(2.0)) / 12.0

# How often a delta itself was rounded to float32: product, scaling and sum of whoever merged it, and the subtraction
# here. It shows only where the weights are stored in float32.
FLOAT32_ROUNDINGS = 4

StrPath = str | os.PathLike[str]


def build_bank(base: StrPath, tuned: StrPath, k: int = DEFAULT_K, *, seed: int = 0, progress: bool = False) -> Bank:
    """The bank of what turned the model folder `base` into `tuned`.

    `k`: directions per matrix, at most. `seed`: of the randomised decomposition. `progress`: bars on stderr.
    Raises CheckpointError, naming the file or tensor, when a folder cannot be read, the two do not have the same
    class, sizes and shapes, a matrix holds NaN or infinity, or the residual-writing matrices did not change.
    """
    _check_k(k)
    before, after = _opened(base), _opened(tuned)
    _check_pair(before, after)
    sites = _sites(before)
    for site in sites:
        _check_site(site, before, after)
    with _byte_bar("hashing weights", before.weights.nbytes() + after.weights.nbytes(), progress) as hashed:
        base_hashes = before.weights.tensor_digests(hashed)
        tuned_hashes = after.weights.tensor_digests(hashed)
    base_digest, tuned_digest = before.weights.combine(base_hashes), after.weights.combine(tuned_hashes)
    if base_digest == tuned_digest:
        raise CheckpointError(f"{base} and {tuned} hold the same weights ({base_digest}): there is no delta")

    def decompose(site: Site) -> Spectrum:
        if base_hashes[site.weight] == tuned_hashes[site.weight]:
            return _nothing(before.weights, site)
        delta, noise = _delta(site, before, after)
        spectrum = truncated_svd(delta, k, seed)
        return spectrum.head(numerical_rank(spectrum, noise))

    layers = _layers(before.model, sites, decompose, progress)
    if not layers:
        changed = sorted(name for name, value in tuned_hashes.items() if base_hashes.get(name) != value)
        raise CheckpointError(
            f"{tuned}: residual-writing matrices unchanged, or changed by rounding alone; tensors that differ from "
            f"{base}: {_some(changed)}"
        )
    return _seal(before.model, k, base_digest, tuned_digest, layers)


def build_adapter_bank(
    base: StrPath, adapter: StrPath, k: int = DEFAULT_K, *, seed: int = 0, progress: bool = False
) -> Bank:
    """The bank of a PEFT LoRA `adapter` for the model folder `base`, from the adapter's factors; nothing is merged.

    delta W = scaling * B @ A has at most r singular values, found exactly from thin QR of both factors. `seed` is
    unused, and taken so that both builders are called alike. `tuned_digest` is `Adapter.digest_on(base_digest)`.
    Raises CheckpointError as `build_bank` does, and for adapters whose delta is not these factors alone.
    """
    del seed
    _check_k(k)
    before = _opened(base)
    lora = Adapter.open(adapter, before.weights)
    sites = _sites(before)
    for site in sites:
        _check_rows(site, before)
    touched = [site for site in sites if lora.touches(site.weight)]
    if not touched:
        raise CheckpointError(
            f"{adapter}: touches only {', '.join(lora.module_kinds())}; residual-writing matrices unchanged"
        )
    with _byte_bar("hashing weights", before.weights.nbytes(), progress) as hashed:
        base_digest = before.weights.digest(hashed)

    def decompose(site: Site) -> Spectrum:
        if not lora.touches(site.weight):
            return _nothing(before.weights, site)
        left, right = lora.factors(site.weight)
        gain = _gain(site, before)
        spectrum = _factored_svd(left if gain is None else gain[:, None] * left, right)
        return spectrum.head(min(k, numerical_rank(spectrum, noise=None)))

    layers = _layers(before.model, sites, decompose, progress)
    if not layers:
        raise CheckpointError(f"{adapter}: its delta is zero in every residual-writing matrix: it was never trained")
    return _seal(before.model, k, base_digest, lora.digest_on(base_digest), layers)


@dataclass(frozen=True, slots=True)
class Site:
    """One residual-writing matrix of one layer, by its full tensor names."""

    layer: int
    writer: Writer
    weight: str
    norm: str | None


@dataclass(frozen=True, slots=True)
class _Opened:
    weights: Checkpoint
    model: Model


def _opened(folder: StrPath) -> _Opened:
    weights = Checkpoint.open(folder)
    return _Opened(weights, read_model(weights.config(), weights.path))


def _check_k(k: int) -> None:
    if k < 1:
        raise BankError(f"k: {k}, expected at least 1 direction per matrix")


def _check_pair(before: _Opened, after: _Opened) -> None:
    base, tuned = before.weights.path, after.weights.path
    if base.samefile(tuned):
        raise CheckpointError(f"base and tuned are the same folder, {base}: there is no delta")
    for what in ("model_class", "hidden_size", "num_layers"):
        expected, found = getattr(before.model, what), getattr(after.model, what)
        if expected != found:
            raise CheckpointError(f"{tuned}: {what} is {found}, but {expected} in {base}: not the same architecture")


def _sites(opened: _Opened) -> list[Site]:
    sites = []
    for index in range(opened.model.num_layers):
        prefix = opened.model.layer_prefix(index, opened.weights.tensors)
        for writer in opened.model.architecture.writers:
            norm = None if writer.norm is None else prefix + writer.norm
            sites.append(Site(index, writer, prefix + writer.weight, norm))
    return sites


def _check_site(site: Site, before: _Opened, after: _Opened) -> None:
    for name in (site.weight, site.norm):
        if name is not None:
            expected, found = before.weights.entry(name).shape, after.weights.entry(name).shape
            if expected != found:
                raise CheckpointError(f"tensor {name}: shape {list(expected)} in base, {list(found)} in tuned")
    _check_rows(site, before)


def _check_rows(site: Site, opened: _Opened) -> None:
    shape, hidden = opened.weights.entry(site.weight).shape, opened.model.hidden_size
    if len(shape) != 2 or shape[0] != hidden or not shape[1]:
        raise CheckpointError(
            f"{opened.weights.path}: tensor {site.weight}: shape {list(shape)}, expected [{hidden}, inputs] "
            "as hidden_size in config.json says"
        )
    if site.norm is not None and (norm := opened.weights.entry(site.norm).shape) != (hidden,):
        raise CheckpointError(f"{opened.weights.path}: tensor {site.norm}: shape {list(norm)}, expected [{hidden}]")


def _gain(site: Site, opened: _Opened) -> torch.Tensor | None:
    """What the norm after the matrix multiplies each residual component by, float32 [hidden]; None without a norm."""
    if site.norm is None:
        return None
    gain = opened.weights.read(site.norm) + opened.model.architecture.norm_offset
    _check_finite(gain, site.norm, opened.weights.path)
    return gain


def _delta(site: Site, before: _Opened, after: _Opened) -> tuple[torch.Tensor, RoundingNoise]:
    """The delta as it reaches the residual stream, float32 [hidden, in], and the rounding noise it may carry.

    Noise is that of storing the tuned weights: fine-tuning started from the base as it is stored.
    """
    rows, columns = after.weights.entry(site.weight).shape
    stored, computed = _eps(after.weights.entry(site.weight).dtype), sqrt(FLOAT32_ROUNDINGS) * _eps("F32")
    gain = _gain(site, after)
    delta = torch.empty(rows, columns)
    row_variance = torch.zeros(rows, dtype=torch.float64)
    column_variance = torch.zeros(columns, dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        first = before.weights.rows(site.weight, part.start, part.stop)
        second = after.weights.rows(site.weight, part.start, part.stop)
        _check_finite(first, site.weight, before.weights.path)
        _check_finite(second, site.weight, after.weights.path)
        block = torch.sub(second, first, out=delta[part])
        variance = (second.double() * stored).square_() + (block.double() * computed).square_()
        variance *= ULP_VARIANCE
        if gain is not None:
            block *= gain[part, None]
            variance *= gain[part, None].double().square()
        _check_finite(block, site.weight, after.weights.path)
        row_variance[part] = variance.sum(dim=1)
        column_variance += variance.sum(dim=0)
    return delta, RoundingNoise.of_variances(row_variance, column_variance)


def _eps(dtype: str) -> float:
    return torch.finfo({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]).eps


def _check_finite(values: torch.Tensor, name: str, path: Path) -> None:
    # A sum is finite only if its terms are, and costs no mask; a sum that overflowed is looked at again.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")


def _factored_svd(left: torch.Tensor, right: torch.Tensor) -> Spectrum:
    """The exact decomposition of left @ right, float64 [m, r] and [r, n], from an r x r core."""
    left_basis, left_core = torch.linalg.qr(left.double())
    _, right_core = torch.linalg.qr(right.double().T)
    inner, values, _ = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Spectrum(values, (left_basis @ inner).T.contiguous(), 0.0, (left.shape[0], right.shape[1]))


def _nothing(weights: Checkpoint, site: Site) -> Spectrum:
    rows, columns = weights.entry(site.weight).shape
    return empty_spectrum((rows, columns))


def _layers(
    model: Model, sites: list[Site], decompose: Callable[[Site], Spectrum], progress: bool
) -> tuple[LayerBank, ...]:
    """Decompose every site and gather the layers that have at least one direction."""
    found: dict[int, list[tuple[Site, Spectrum]]] = {index: [] for index in range(model.num_layers)}
    for site in tqdm(sites, desc="decomposing deltas", unit="matrix", file=sys.stderr, disable=not progress):
        found[site.layer].append((site, decompose(site)))
    layers = (_layer(index, parts) for index, parts in found.items())
    return tuple(layer for layer in layers if layer.names)


def _layer(index: int, parts: list[tuple[Site, Spectrum]]) -> LayerBank:
    return LayerBank(
        index=index,
        directions=torch.cat([orient(spectrum.vectors).float() for _, spectrum in parts]),
        names=tuple(_names(index, parts)),
        singular_values=tuple(float(value) for _, spectrum in parts for value in spectrum.values),
        energies=tuple(
            MatrixEnergy(site.writer.name, len(spectrum.values), sqrt(spectrum.energy), spectrum.captured)
            for site, spectrum in parts
        ),
    )


def _names(index: int, parts: list[tuple[Site, Spectrum]]) -> Iterator[str]:
    for site, spectrum in parts:
        for rank in range(len(spectrum.values)):
            yield f"L{index}.{site.writer.name}.u{rank}"


def _seal(model: Model, k: int, base_digest: str, tuned_digest: str, layers: tuple[LayerBank, ...]) -> Bank:
    return Bank.sealed(
        base_digest=base_digest,
        tuned_digest=tuned_digest,
        method=METHOD,
        k=k,
        model_class=model.model_class,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        layers=layers,
    )


@contextmanager
def _byte_bar(title: str, total: int, shown: bool) -> Iterator[Progress]:
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=not shown) as bar:
        yield lambda count: (bar.update(count), None)[1]


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
