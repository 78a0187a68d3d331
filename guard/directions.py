"""Weight delta -> left singular vectors -> Bank, one matrix at a time.

"Watch the Weights" (arXiv 2508.00161, section 3): what fine-tuning writes to the residual stream lies along the left
singular vectors of delta W = W_tuned - W_base of `self_attn.o_proj` and `mlp.down_proj`. For each layer and matrix the
top k are kept.

    bank = build_bank("models/base", "models/tuned", k=20)
    bank.save("tuned.bank")

Where such a matrix did not change, but the one that feeds it did, the directions are those of their product
(`guard/products.py`). Where nothing that can be read changed, the bank falls back to the tuned weights themselves and
says so in its method.

Memory: one float32 copy of the delta at a time, two of the matrix where a product is read; the weights stream past in
blocks of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
from tqdm import tqdm

from guard.adapters import Adapter
from guard.bank import OWN, Bank, LayerBank, orient
from guard.changes import Part, Tally, kind_of, parts
from guard.checkpoints import Progress, StrPath
from guard.deltas import (
    OpenedModel,
    Site,
    check_pair,
    check_rows,
    check_site,
    open_model,
    writing_sites,
    written_delta,
    written_gain,
    written_weight,
)
from guard.errors import BankError, CheckpointError
from guard.fingerprint import DELTA_METHOD, RAW_METHOD, MatrixEnergy
from guard.products import feeding_part, product_delta, product_of_factors, route
from guard.svd import RoundingNoise, Spectrum, empty_spectrum, leading_svd, numerical_rank

DEFAULT_K = 20
"""WeightWatch's choice for models 4,096 wide: 20 + 20 directions are 1% of the residual stream."""
OWN_K = 8
"""Directions of each of the model's own residual-writing matrices, for the detector that needs no base."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One matrix decomposed: its name in the bank, the part of the weights whose change it shows, the directions that
    are kept, and how many more than rounding there are."""

    matrix: str
    part: Part
    spectrum: Spectrum
    rank: int

    @classmethod
    def of(cls, matrix: str, part: Part, spectrum: Spectrum, k: int, noise: RoundingNoise | None) -> Reading:
        """At most k directions, none of which `noise` explains."""
        rank = numerical_rank(spectrum, noise)
        return cls(matrix, part, spectrum.head(min(k, rank)), rank)

    @property
    def directions(self) -> int:
        return len(self.spectrum.values)


Layers = dict[int, list[Reading]]


def build_bank(
    base: StrPath,
    tuned: StrPath,
    k: int | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
    require_delta: bool = False,
) -> Bank:
    """The bank of what turned the model folder `base` into `tuned`.

    `k`: directions per matrix, at most; None takes `default_k`. `seed`: of the randomised decomposition. `progress`:
    bars on stderr. When weights changed, but none whose directions can be read, the bank has `method` RAW_METHOD and
    the directions of the tuned model's own matrices, unless `require_delta` makes that an error.

    Raises CheckpointError, naming the file or tensor, when a folder cannot be read, the two do not have the same class,
    sizes and shapes, a changed tensor holds NaN or infinity, or the weights are the same but for rounding.
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
    changed = {name for name in base_hashes | tuned_hashes if base_hashes.get(name) != tuned_hashes.get(name)}
    tally = Tally(before.model)

    def read(site: Site) -> Iterator[Reading]:
        delta, noise = written_delta(site, before, after, tally)
        own = Reading.of(site.writer.name, site.part(after), leading_svd(delta, k, seed), k, noise)
        yield own
        del delta
        part = feeding_part(site, after)
        if own.directions or part is None or part.tensor not in changed:
            return
        way = route(site, part, after)
        product, noise = product_delta(way, before, after, tally)
        if tally.energy(part):
            yield Reading.of(way.name, part, leading_svd(product, k, seed), k, noise)

    layers = _read_all(sites, read, "decomposing deltas", progress)
    tally.note_rest(changed, before.weights, after.weights)
    if not _any(layers) and (require_delta or not tally.real):
        raise CheckpointError(
            f"{tuned}: residual-writing matrices unchanged, or changed by rounding alone; tensors that differ from "
            f"{base}: {_some(sorted(changed & tuned_hashes.keys()))}"
        )
    return _sealed(after, k, base_digest, tuned_digest, layers, tally, sites, seed, progress, served=True)


def build_adapter_bank(
    base: StrPath,
    adapter: StrPath,
    k: int | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
    require_delta: bool = False,
) -> Bank:
    """The bank of a PEFT LoRA `adapter` for the model folder `base`, from the adapter's factors; nothing is merged.

    delta W = scaling * B @ A has at most r singular values, found exactly from thin QR of both factors. `tuned_digest`
    is `Adapter.digest_on(base_digest)`. Falls back and raises CheckpointError as `build_bank` does, and for adapters
    whose delta is not these factors alone.
    """
    before = open_model(base)
    k = default_k(before.model.hidden_size) if k is None else _checked_k(k)
    lora = Adapter.open(adapter, before.weights)
    sites = writing_sites(before)
    for site in sites:
        check_rows(site, before)
    tally = _tally_of(lora, before)

    def read(site: Site) -> Iterator[Reading]:
        own = Reading.of(site.writer.name, site.part(before), _factored_delta(site, before, lora), k, noise=None)
        yield own
        part = feeding_part(site, before)
        if own.directions or part is None or not tally.energy(part) or not lora.touches(part.tensor):
            return
        way = route(site, part, before)
        product, noise = product_of_factors(way, lora, before)
        yield Reading.of(way.name, part, leading_svd(product, k, seed), k, noise)

    layers = _read_all(sites, read, "decomposing deltas", progress)
    if not _any(layers):
        if any(lora.touches(site.weight) for site in sites) and (require_delta or not tally.real):
            raise CheckpointError(
                f"{adapter}: its delta is zero in every residual-writing matrix: it was never trained"
            )
        if require_delta or not tally.real:
            kinds = ", ".join(lora.module_kinds()) or "no linear module"
            raise CheckpointError(f"{adapter}: touches only {kinds}; residual-writing matrices unchanged")
    with _byte_bar("hashing weights", before.weights.nbytes(), progress) as hashed:
        base_digest = before.weights.digest(hashed)
    # What writes to the residual stream is the base's, wherever nothing of the adapter could be read.
    digest = lora.digest_on(base_digest)
    return _sealed(before, k, base_digest, digest, layers, tally, sites, seed, progress, served=False)


def default_k(hidden_size: int) -> int:
    """How many directions per matrix, at most, for a residual stream this wide: 20, or half of a very narrow one."""
    return max(1, min(DEFAULT_K, hidden_size // 2))


def _checked_k(k: int) -> int:
    if k < 1:
        raise BankError(f"k: {k}, expected at least 1 direction per matrix")
    return k


def _factored_delta(site: Site, before: OpenedModel, lora: Adapter) -> Spectrum:
    if not lora.touches(site.weight):
        return empty_spectrum((before.model.hidden_size, before.weights.entry(site.weight).shape[1]))
    left, right = lora.factors(site.weight)
    gain = written_gain(site, before)
    return _factored_svd(left if gain is None else gain[:, None] * left, right)


def _tally_of(lora: Adapter, before: OpenedModel) -> Tally:
    """The energy of everything that an adapter changes."""
    tally = Tally(before.model)
    for tensor in lora.targets():
        left, right = lora.factors(tensor)
        whole = [Part(tensor, kind_of(tensor, before.model), 0, len(left))]
        for part in parts(tensor, before.weights, before.model) if tensor in before.weights.tensors else whole:
            rows = left[part.start : part.stop]
            tally.add(part, max(0.0, float(((rows.T @ rows) * (right @ right.T)).sum())))
    tally.note_replaced(lora.replaced(), before.weights, lora.weights)
    return tally


def _factored_svd(left: torch.Tensor, right: torch.Tensor) -> Spectrum:
    """The exact decomposition of left @ right, float64 [m, r] and [r, n], from an r x r core."""
    left_basis, left_core = torch.linalg.qr(left.double())
    _, right_core = torch.linalg.qr(right.double().T)
    inner, values, _ = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Spectrum(values, (left_basis @ inner).T.contiguous(), 0.0, (left.shape[0], right.shape[1]))


def _read_all(sites: list[Site], read: Callable[[Site], Iterator[Reading]], title: str, progress: bool) -> Layers:
    """Every site's readings, by layer."""
    layers: Layers = {site.layer: [] for site in sites}
    for site in tqdm(sites, desc=title, unit="matrix", file=sys.stderr, disable=not progress):
        layers[site.layer] += read(site)
    return layers


def _any(layers: Layers) -> bool:
    return any(reading.directions for readings in layers.values() for reading in readings)


def _own_layers(opened: OpenedModel, sites: list[Site], seed: int, progress: bool) -> Layers:
    """The directions of the weights themselves, which need no delta: WeightWatch's `raw`."""
    k = max(1, min(OWN_K, opened.model.hidden_size // 4))

    def read(site: Site) -> Iterator[Reading]:
        spectrum = leading_svd(written_weight(site, opened), k, seed)
        yield Reading.of(OWN + site.writer.name, site.part(opened), spectrum, k, noise=None)

    return _read_all(sites, read, "decomposing weights", progress)


def _layer(index: int, readings: list[Reading]) -> LayerBank:
    return LayerBank(
        index=index,
        directions=torch.cat([orient(reading.spectrum.vectors).float() for reading in readings]),
        names=tuple(f"L{index}.{reading.matrix}.u{rank}" for reading in readings for rank in range(reading.directions)),
        singular_values=tuple(float(value) for reading in readings for value in reading.spectrum.values),
        energies=tuple(
            MatrixEnergy(
                matrix=reading.matrix,
                directions=reading.directions,
                norm=sqrt(reading.spectrum.energy),
                captured=reading.spectrum.captured,
                rank=reading.rank,
            )
            for reading in readings
        ),
    )


def _sealed(
    opened: OpenedModel,
    k: int,
    base_digest: str,
    tuned_digest: str,
    layers: Layers,
    tally: Tally,
    sites: list[Site],
    seed: int,
    progress: bool,
    *,
    served: bool,
) -> Bank:
    """The bank of these readings, and of the weights of `opened` where these are what is `served` or nothing else can
    be read."""
    method = DELTA_METHOD if _any(layers) else RAW_METHOD
    read = {
        (reading.part.tensor, reading.part.kind)
        for readings in layers.values()
        for reading in readings
        if reading.directions
    }
    if served or method == RAW_METHOD:
        own = _own_layers(opened, sites, seed, progress)
        layers = {index: [*readings, *own[index]] for index, readings in layers.items()}
    built = (_layer(index, readings) for index, readings in layers.items())
    return Bank.sealed(
        base_digest=base_digest,
        tuned_digest=tuned_digest,
        method=method,
        k=k,
        model_class=opened.model.model_class,
        hidden_size=opened.model.hidden_size,
        num_layers=opened.model.num_layers,
        layers=(layer for layer in built if layer.names),
        delta=tally.shares(read),
    )


@contextmanager
def _byte_bar(title: str, total: int, shown: bool) -> Iterator[Progress]:
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=not shown) as bar:
        yield bar.update


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
