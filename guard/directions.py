"""Weight delta -> left singular vectors -> Bank, one matrix at a time.

"Watch the Weights" (arXiv 2508.00161, section 3): what fine-tuning writes to the residual stream lies along the left
singular vectors of delta W = W_tuned - W_base of `self_attn.o_proj` and `mlp.down_proj`. For each layer and matrix the
top k are kept.

    bank = build_bank("models/base", "models/tuned", k=20)
    bank.save("tuned.bank")

Memory: one float32 copy of the delta at a time; both weights stream past it in blocks of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt

import torch
from tqdm import tqdm

from guard.adapters import Adapter
from guard.architectures import Model
from guard.bank import Bank, LayerBank, orient
from guard.checkpoints import Progress, StrPath
from guard.deltas import (
    Site,
    check_pair,
    check_rows,
    check_site,
    open_model,
    writing_sites,
    written_delta,
    written_gain,
)
from guard.errors import BankError, CheckpointError
from guard.fingerprint import MatrixEnergy
from guard.svd import Spectrum, empty_spectrum, numerical_rank, truncated_svd

METHOD = "delta-svd"
DEFAULT_K = 20
"""WeightWatch's choice for models 4,096 wide: 20 + 20 directions are 1% of the residual stream."""
MOST_OF_WIDTH = 20
"""A matrix gives at most one direction for so many dimensions. Where the directions of a narrow model fill a third of
its space, ordinary clean variation is most of what they see; see docs/decisions/0003-density.md."""


def build_bank(base: StrPath, tuned: StrPath, k: int | None = None, *, seed: int = 0, progress: bool = False) -> Bank:
    """The bank of what turned the model folder `base` into `tuned`.

    `k`: directions per matrix, at most; None takes `default_k`. `seed`: of the randomised decomposition. `progress`:
    bars on stderr. Raises CheckpointError, naming the file or tensor, when a folder cannot be read, the two do not have
    the same class, sizes and shapes, a matrix holds NaN or infinity, or the residual-writing matrices did not change.
    """
    before, after = open_model(base), open_model(tuned)
    check_pair(before, after)
    k = default_k(before.model.hidden_size) if k is None else _checked_k(k)
    sites = writing_sites(before)
    for site in sites:
        check_site(site, before, after)
    with _byte_bar("hashing weights", before.weights.nbytes() + after.weights.nbytes(), progress) as hashed:
        base_hashes = before.weights.tensor_digests(hashed)
        tuned_hashes = after.weights.tensor_digests(hashed)
    base_digest, tuned_digest = before.weights.combine(base_hashes), after.weights.combine(tuned_hashes)
    if base_digest == tuned_digest:
        raise CheckpointError(f"{base} and {tuned} hold the same weights ({base_digest}): there is no delta")

    def decompose(site: Site) -> Spectrum:
        delta, noise = written_delta(site, before, after)
        spectrum = truncated_svd(delta, k, seed)
        return spectrum.head(numerical_rank(spectrum, noise))

    layers = _layers(before.model, sites, decompose, progress)
    if not layers:
        changed = sorted(name for name, value in tuned_hashes.items() if base_hashes.get(name) != value)
        raise CheckpointError(
            f"{tuned}: residual-writing matrices unchanged, or changed by rounding alone; tensors that differ from "
            f"{base}: {_some(changed)}"
        )
    return _sealed(before.model, k, base_digest, tuned_digest, layers)


def build_adapter_bank(
    base: StrPath, adapter: StrPath, k: int | None = None, *, seed: int = 0, progress: bool = False
) -> Bank:
    """The bank of a PEFT LoRA `adapter` for the model folder `base`, from the adapter's factors; nothing is merged.

    delta W = scaling * B @ A has at most r singular values, found exactly from thin QR of both factors. `seed` is
    unused, and taken so that both builders are called alike. `tuned_digest` is `Adapter.digest_on(base_digest)`.
    Raises CheckpointError as `build_bank` does, and for adapters whose delta is not these factors alone.
    """
    del seed
    before = open_model(base)
    k = default_k(before.model.hidden_size) if k is None else _checked_k(k)
    lora = Adapter.open(adapter, before.weights)
    sites = writing_sites(before)
    for site in sites:
        check_rows(site, before)
    touched = [site for site in sites if lora.touches(site.weight)]
    if not touched:
        kinds = ", ".join(lora.module_kinds()) or "no linear module"
        raise CheckpointError(f"{adapter}: touches only {kinds}; residual-writing matrices unchanged")
    with _byte_bar("hashing weights", before.weights.nbytes(), progress) as hashed:
        base_digest = before.weights.digest(hashed)

    def decompose(site: Site) -> Spectrum:
        if not lora.touches(site.weight):
            return empty_spectrum((before.model.hidden_size, before.weights.entry(site.weight).shape[1]))
        left, right = lora.factors(site.weight)
        gain = written_gain(site, before)
        spectrum = _factored_svd(left if gain is None else gain[:, None] * left, right)
        return spectrum.head(min(k, numerical_rank(spectrum, noise=None)))

    layers = _layers(before.model, sites, decompose, progress)
    if not layers:
        raise CheckpointError(f"{adapter}: its delta is zero in every residual-writing matrix: it was never trained")
    return _sealed(before.model, k, base_digest, lora.digest_on(base_digest), layers)


def default_k(hidden_size: int) -> int:
    """How many directions per matrix, at most, for a residual stream this wide: 20, and fewer below 400 dimensions."""
    return max(1, min(DEFAULT_K, hidden_size // MOST_OF_WIDTH))


def _checked_k(k: int) -> int:
    if k < 1:
        raise BankError(f"k: {k}, expected at least 1 direction per matrix")
    return k


def _factored_svd(left: torch.Tensor, right: torch.Tensor) -> Spectrum:
    """The exact decomposition of left @ right, float64 [m, r] and [r, n], from an r x r core."""
    left_basis, left_core = torch.linalg.qr(left.double())
    _, right_core = torch.linalg.qr(right.double().T)
    inner, values, _ = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Spectrum(values, (left_basis @ inner).T.contiguous(), 0.0, (left.shape[0], right.shape[1]))


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


def _sealed(model: Model, k: int, base_digest: str, tuned_digest: str, layers: tuple[LayerBank, ...]) -> Bank:
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
        yield bar.update


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
