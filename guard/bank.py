"""A bank: the directions that fine-tuning added to a model, per layer, bound to the weights they came from.

    bank = Bank.load("tuned.bank")
    for layer in bank.layers:
        cosines = residual @ layer.directions.T          # residual: unit rows [tokens, hidden]

A bank file is safetensors: `layers.{i}.directions` float32 [K_i, hidden_size], and one JSON string of metadata. Reading
one never runs code, and a file that was changed after it was built is refused (`guard/fingerprint.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save

from guard.atomic import write_atomically
from guard.checkpoints import StrPath
from guard.errors import BankError
from guard.fingerprint import (
    METADATA_KEY,
    OWN,
    BankHeader,
    DeltaShare,
    LayerHeader,
    MatrixEnergy,
    is_own,
    open_bank,
    read_header,
    seal,
    tensor_name,
)
from guard.version import VERSION

__all__ = [
    "OWN",
    "Bank",
    "BankHeader",
    "DeltaShare",
    "LayerBank",
    "MatrixEnergy",
    "is_own",
    "orient",
    "random_bank",
    "read_header",
]

# float32 rounding leaves a norm within 1e-6 of one; a wrong vector is nowhere near.
UNIT_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class LayerBank:
    """The directions of one decoder layer.

    `directions`: float32 [K, hidden_size], unit rows: first those of the delta, then those of the model's own matrices;
    in each the attention's before the MLP's, and these by falling singular value. `names`: K stable names such as
    "L3.o_proj.u0". `singular_values`: K floats, in units of the weights.
    `energies`: one entry per matrix, for reports.
    """

    index: int
    directions: torch.Tensor
    names: tuple[str, ...]
    singular_values: tuple[float, ...]
    energies: tuple[MatrixEnergy, ...] = ()

    def __post_init__(self) -> None:
        assert self.directions.dtype == torch.float32, self.directions.dtype
        assert self.directions.shape[0] == len(self.names) == len(self.singular_values), self.names

    def header(self) -> LayerHeader:
        return LayerHeader(self.index, self.names, self.singular_values, self.energies)


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Directions per layer for one model. Make one with `Bank.sealed` or `Bank.load`; the fingerprint then fits.

    `layers` holds only layers with at least one direction, by ascending index. `base_digest` and `tuned_digest` are
    what `Checkpoint.digest` gives for the two models (for an adapter: `Adapter.digest_on`). `method` is "delta-svd", or
    what else the directions come from: "raw-svd", "random". `delta`: where the change lies, and what of it is read.
    """

    fingerprint: str
    base_digest: str
    tuned_digest: str
    method: str
    k: int
    version: str
    model_class: str
    hidden_size: int
    num_layers: int
    layers: tuple[LayerBank, ...]
    delta: tuple[DeltaShare, ...] = ()

    @classmethod
    def sealed(
        cls,
        *,
        base_digest: str,
        tuned_digest: str,
        method: str,
        k: int,
        model_class: str,
        hidden_size: int,
        num_layers: int,
        layers: Iterable[LayerBank],
        delta: Iterable[DeltaShare] = (),
    ) -> Bank:
        """A bank with this version of Undertow and the fingerprint of its content."""
        bank = cls(
            fingerprint="",
            base_digest=base_digest,
            tuned_digest=tuned_digest,
            method=method,
            k=k,
            version=VERSION,
            model_class=model_class,
            hidden_size=hidden_size,
            num_layers=num_layers,
            layers=tuple(layers),
            delta=tuple(delta),
        )
        return replace(bank, fingerprint=seal(bank.header(), {i: _raw(t) for i, t in bank._tensors().items()}))

    def header(self) -> BankHeader:
        """Everything but the directions."""
        return BankHeader(
            fingerprint=self.fingerprint,
            base_digest=self.base_digest,
            tuned_digest=self.tuned_digest,
            method=self.method,
            k=self.k,
            version=self.version,
            model_class=self.model_class,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            layers=tuple(layer.header() for layer in self.layers),
            delta=self.delta,
        )

    def save(self, path: StrPath) -> None:
        """Write the bank file, whole or not at all. Raises BankError when the folder is absent or `path` is one."""
        tensors = {tensor_name(index): tensor for index, tensor in self._tensors().items()}
        content = save(tensors, metadata={METADATA_KEY: self.header().to_json()})
        write_atomically(Path(path), content, BankError)

    @classmethod
    def load(cls, path: StrPath) -> Bank:
        """Read and check a bank file.

        Raises BankError, naming file, field, value and expectation, when the file is not safetensors, misses a field,
        has other shapes than its header says, rows that are not unit vectors, or content other than its fingerprint.
        """
        file = Path(path)
        header, raw = open_bank(file)
        layers = []
        for layer in header.layers:
            directions = torch.frombuffer(raw[layer.index], dtype=torch.float32).reshape(-1, header.hidden_size)
            _check_unit(directions, layer, file)
            layers.append(LayerBank(layer.index, directions, layer.names, layer.singular_values, layer.energies))
        return cls(
            fingerprint=header.fingerprint,
            base_digest=header.base_digest,
            tuned_digest=header.tuned_digest,
            method=header.method,
            k=header.k,
            version=header.version,
            model_class=header.model_class,
            hidden_size=header.hidden_size,
            num_layers=header.num_layers,
            layers=tuple(layers),
            delta=header.delta,
        )

    def _tensors(self) -> dict[int, torch.Tensor]:
        return {layer.index: layer.directions.detach().cpu().contiguous() for layer in self.layers}


def orient(directions: torch.Tensor) -> torch.Tensor:
    """The rows of `directions` [K, hidden] with the sign that makes each row's largest component positive.

    A singular vector is defined up to its sign; without a convention two builds of one bank could disagree.
    """
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -directions, directions)


def random_bank(like: Bank, seed: int) -> Bank:
    """Random unit directions in the shapes and under the names of `like`, method "random": a baseline.

    A detector that does as well with these does not owe its success to the weight delta. Singular values are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in like.layers:
        gaussian = torch.randn(layer.directions.shape, generator=generator, dtype=torch.float64)
        directions = orient(gaussian / gaussian.norm(dim=1, keepdim=True)).float()
        layers.append(LayerBank(layer.index, directions, layer.names, (0.0,) * len(layer.names)))
    return Bank.sealed(
        base_digest=like.base_digest,
        tuned_digest=like.tuned_digest,
        method="random",
        k=like.k,
        model_class=like.model_class,
        hidden_size=like.hidden_size,
        num_layers=like.num_layers,
        layers=layers,
    )


def _check_unit(directions: torch.Tensor, layer: LayerHeader, path: Path) -> None:
    norms = directions.double().norm(dim=1)
    # Written so that NaN fails too.
    wrong = ~((norms - 1.0).abs() <= UNIT_TOLERANCE)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise BankError(f"{path}: direction {layer.names[row]}: norm {float(norms[row]):.6g}, expected 1")


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
