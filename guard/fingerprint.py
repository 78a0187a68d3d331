"""What a bank says of itself, readable without torch: the header and the fingerprint that seals it.

The fingerprint is SHA-256 over the bank's content: digests of both models, method, sizes, every direction's name,
singular value and bytes. Calibrations, servers and workers carry it, and agree by comparing it. The version of Undertow
that built the bank is not part of it: the same directions are the same bank.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from guard.checkpoints import StrPath
from guard.errors import BankError
from guard.shards import Shard, TensorEntry, read_bytes

FORMAT = 2
"""2: MatrixEnergy.rank, BankHeader.delta."""
DELTA_METHOD = "delta-svd"
RAW_METHOD = "raw-svd"
"""No delta could be read: the directions are those of the tuned weights themselves."""
OWN = "own_"
"""Begins the matrix's name of a direction that comes from the tuned model's own matrix, as in `L3.own_o_proj.u0`."""
METADATA_KEY = "undertow"
MAX_LAYERS = 10_000
MAX_TEXT = 200

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MatrixEnergy:
    """How much of one matrix's delta its directions hold.

    `directions`: how many were kept, at most k. `norm`: Frobenius norm of the delta as it reaches the residual stream.
    `captured`: sum of the kept singular values squared, over `norm` squared; 0.0 for a delta of zero. `rank`: singular
    values that are more than rounding, at least so many: of a large matrix only the leading ones are computed.
    """

    matrix: str
    directions: int
    norm: float
    captured: float
    rank: int


@dataclass(frozen=True, slots=True)
class DeltaShare:
    """How much of all that changed lies in one kind of matrix, and how much of it the bank reads.

    `share`: of the delta's energy (squared Frobenius norm of tuned - base, over all tensors), in this kind; the shares
    add up to one. `read`: of the same total, in those matrices of this kind that the bank has directions of.
    `tensors`: how many of this kind changed; `first`: the name of one of them.
    """

    kind: str
    share: float
    read: float
    tensors: int
    first: str


@dataclass(frozen=True, slots=True)
class LayerHeader:
    """One layer's directions without their numbers: `names` and `singular_values` run along the rows."""

    index: int
    names: tuple[str, ...]
    singular_values: tuple[float, ...]
    energies: tuple[MatrixEnergy, ...]


@dataclass(frozen=True, slots=True)
class BankHeader:
    """Everything in a bank file but the directions."""

    fingerprint: str
    base_digest: str
    tuned_digest: str
    method: str
    k: int
    version: str
    model_class: str
    hidden_size: int
    num_layers: int
    layers: tuple[LayerHeader, ...]
    delta: tuple[DeltaShare, ...] = ()

    @property
    def read_share(self) -> float:
        """How much of the delta's energy lies in matrices that this bank reads; 0.0 where that was not counted."""
        return sum(part.read for part in self.delta)

    def to_json(self) -> str:
        """The metadata string of a bank file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False)


def is_own(name: str) -> bool:
    """Whether a direction's name says that it comes from the tuned model's own matrix, not from the delta."""
    return name.partition(".")[2].startswith(OWN)


def tensor_name(index: int) -> str:
    """The name in a bank file of layer `index`'s directions, float32 [K, hidden_size]."""
    return f"layers.{index}.directions"


def seal(header: BankHeader, direction_bytes: Mapping[int, bytes | bytearray | memoryview]) -> str:
    """The fingerprint of a bank: `header` (its own fingerprint and version aside) and each layer's float32 bytes."""
    content = {"format": FORMAT, **asdict(header)}
    del content["fingerprint"], content["version"]
    content["directions"] = {str(index): hashlib.sha256(raw).hexdigest() for index, raw in direction_bytes.items()}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def read_header(path: StrPath) -> BankHeader:
    """The header of a bank file, its fingerprint recomputed and compared. Needs no torch.

    Raises BankError, naming the file, the field, the value and what was expected.
    """
    return open_bank(Path(path))[0]


def open_bank(path: Path) -> tuple[BankHeader, dict[int, bytearray]]:
    """The header of a bank file and each layer's raw float32 bytes, little-endian, row-major [K, hidden_size]."""
    shard = Shard.open(path, BankError)
    header = _parse(shard)
    raw = {layer.index: _direction_bytes(shard, layer, header) for layer in header.layers}
    extra = set(shard.tensors) - {tensor_name(layer.index) for layer in header.layers}
    if extra:
        raise BankError(f"{path}: tensor {min(extra)} is not in the header's layers")
    expected = seal(header, raw)
    if header.fingerprint != expected:
        raise BankError(
            f"{path}: field fingerprint: {header.fingerprint}, but the content is {expected}: "
            "the file was changed after it was built"
        )
    return header, raw


def _direction_bytes(shard: Shard, layer: LayerHeader, header: BankHeader) -> bytearray:
    name = tensor_name(layer.index)
    entry: TensorEntry | None = shard.tensors.get(name)
    shape = (len(layer.names), header.hidden_size)
    if entry is None:
        raise BankError(f"{shard.path}: tensor {name} is missing")
    if entry.dtype != "F32" or entry.shape != shape:
        raise BankError(f"{shard.path}: tensor {name}: {entry.dtype} {entry.shape}, expected F32 {shape}")
    if sys.byteorder != "little":
        raise BankError(f"{shard.path}: bank files are little-endian; this machine is not")
    return read_bytes(entry)


def _parse(shard: Shard) -> BankHeader:
    path = shard.path
    if METADATA_KEY not in shard.metadata:
        raise BankError(f"{path}: not a bank: metadata key {METADATA_KEY!r} is missing")
    try:
        fields = json.loads(shard.metadata[METADATA_KEY])
    except (ValueError, RecursionError) as cause:
        raise BankError(f"{path}: metadata key {METADATA_KEY!r} is not JSON") from cause
    if not isinstance(fields, dict):
        raise BankError(f"{path}: metadata key {METADATA_KEY!r} is not a JSON object")
    read = _Fields(path, fields, "")
    version = read.take("format", int)
    if version != FORMAT:
        raise BankError(f"{path}: field format: {version}, expected {FORMAT}: built by another version of Undertow")
    header = BankHeader(
        fingerprint=read.take("fingerprint", str),
        base_digest=read.take("base_digest", str),
        tuned_digest=read.take("tuned_digest", str),
        method=read.take("method", str),
        k=read.natural("k", 1, 2**31),
        version=read.take("version", str),
        model_class=read.take("model_class", str),
        hidden_size=read.natural("hidden_size", 1, 2**31),
        num_layers=read.natural("num_layers", 1, MAX_LAYERS),
        layers=tuple(_layer(path, item, place) for place, item in enumerate(read.take("layers", list))),
        delta=tuple(_share(path, item, place) for place, item in enumerate(read.take("delta", list))),
    )
    _check_layers(path, header)
    return header


def _layer(path: Path, item: Any, place: int) -> LayerHeader:
    read = _Fields(path, item, f"layers[{place}].")
    energies = []
    for number, energy in enumerate(read.take("energies", list)):
        part = _Fields(path, energy, f"layers[{place}].energies[{number}].")
        energies.append(
            MatrixEnergy(
                matrix=part.take("matrix", str),
                directions=part.natural("directions", 0, 2**31),
                norm=part.number("norm"),
                captured=part.number("captured"),
                rank=part.natural("rank", 0, 2**31),
            )
        )
    return LayerHeader(
        index=read.natural("index", 0, MAX_LAYERS),
        names=tuple(read.items("names", str)),
        singular_values=tuple(read.numbers("singular_values")),
        energies=tuple(energies),
    )


def _share(path: Path, item: Any, place: int) -> DeltaShare:
    read = _Fields(path, item, f"delta[{place}].")
    return DeltaShare(
        kind=read.take("kind", str),
        share=read.number("share"),
        read=read.number("read"),
        tensors=read.natural("tensors", 1, 2**31),
        first=read.take("first", str),
    )


def _check_layers(path: Path, header: BankHeader) -> None:
    if not header.layers:
        raise BankError(f"{path}: field layers: empty, expected at least one layer with directions")
    last = -1
    for layer in header.layers:
        where = f"{path}: layer {layer.index}"
        if not last < layer.index < header.num_layers:
            raise BankError(f"{where}: expected ascending indices below num_layers {header.num_layers}")
        last = layer.index
        if not layer.names or len(set(layer.names)) != len(layer.names):
            raise BankError(f"{where}: field names: expected one distinct name per direction")
        if len(layer.singular_values) != len(layer.names):
            raise BankError(
                f"{where}: field singular_values: {len(layer.singular_values)} values for {len(layer.names)} names"
            )
        counted = sum(energy.directions for energy in layer.energies)
        if layer.energies and counted != len(layer.names):
            raise BankError(f"{where}: field energies: {counted} directions for {len(layer.names)} names")


class _Fields:
    """Typed reads from one JSON object of the header, each failure naming file, field, value and expectation."""

    def __init__(self, path: Path, fields: Any, prefix: str) -> None:
        if not isinstance(fields, dict):
            raise BankError(f"{path}: field {prefix.rstrip('.')}: expected an object")
        self.path, self.fields, self.prefix = path, fields, prefix

    def take(self, key: str, kind: type[T]) -> T:
        if key not in self.fields:
            raise BankError(f"{self.path}: field {self.prefix}{key} is missing")
        value = self.fields[key]
        # bool is an int to isinstance; here it never is.
        if type(value) is not kind:
            raise self._wrong(key, value, kind.__name__)
        self._check_text(key, value)
        return value

    def natural(self, key: str, low: int, high: int) -> int:
        value = self.take(key, int)
        if not low <= value < high:
            raise self._wrong(key, value, f"{low} to {high - 1}")
        return value

    def number(self, key: str) -> float:
        value = self.take(key, float)
        if not isfinite(value) or value < 0.0:
            raise self._wrong(key, value, "a finite number, zero or more")
        return value

    def items(self, key: str, kind: type[T]) -> list[T]:
        values = self.take(key, list)
        if not all(type(value) is kind for value in values):
            raise self._wrong(key, values, f"a list of {kind.__name__}")
        for value in values:
            self._check_text(key, value)
        return values

    def numbers(self, key: str) -> list[float]:
        values = self.items(key, float)
        if not all(isfinite(value) and value >= 0.0 for value in values):
            raise self._wrong(key, values, "finite numbers, zero or more")
        return values

    def _check_text(self, key: str, value: object) -> None:
        # What a bank says of itself is printed in terminals and logs.
        if isinstance(value, str) and not (value.isprintable() and len(value) <= MAX_TEXT):
            raise self._wrong(key, ascii(value), f"at most {MAX_TEXT} printable characters")

    def _wrong(self, key: str, value: object, expected: str) -> BankError:
        return BankError(f"{self.path}: field {self.prefix}{key}: {str(value)[:80]!r}, expected {expected}")
