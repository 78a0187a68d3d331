"""Where fine-tuning changed a model: the energy of the delta, counted by kind of matrix.

A bank reads the matrices that write to the residual stream. How much of the change lies elsewhere is what its owner has
to know; it is counted while the weights stream past, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from guard.architectures import Model
from guard.checkpoints import FLOAT_DTYPES, Checkpoint
from guard.errors import CheckpointError
from guard.fingerprint import MAX_TEXT, DeltaShare

KINDS = (
    "o_proj",
    "down_proj",
    "v_proj",
    "q_proj",
    "k_proj",
    "gate_proj",
    "up_proj",
    "embed",
    "lm_head",
    "norms",
    "biases",
    "other",
)

BLOCK_BYTES = 1 << 20

# Half the distance between the smallest numbers of each dtype: the most that rounding moves a number near zero.
SMALLEST = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-25}


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of `tensor` that are one kind of matrix: all of them, or a block where several matrices are fused."""

    tensor: str
    kind: str
    start: int
    stop: int


def parts(tensor: str, weights: Checkpoint, model: Model) -> list[Part]:
    """The parts of one tensor of `weights`, by rows. Raises CheckpointError for a fused one of impossible shape."""
    shape = weights.entry(tensor).shape
    rows = shape[0] if shape else 1
    place = model.layer_part(tensor)
    kinds = model.architecture.fused.get(place[1]) if place else None
    if place is None or kinds is None:
        return [Part(tensor, kind_of(tensor, model), 0, rows)]
    heights = [rows // len(kinds)] * len(kinds)
    if kinds[0] == "q_proj":
        # There are as many queries as columns that o_proj reads; the keys and values share what is left.
        queries = weights.entry(place[0] + model.architecture.writers[0].weight).shape[-1]
        heights = [queries, (rows - queries) // 2, (rows - queries) // 2]
    if min(heights) < 1 or sum(heights) != rows:
        raise CheckpointError(f"{weights.path}: tensor {tensor}: {rows} rows are not {', '.join(kinds)}")
    stops = [sum(heights[: place + 1]) for place in range(len(heights))]
    return [Part(tensor, kind, stop - height, stop) for kind, height, stop in zip(kinds, heights, stops, strict=True)]


def row_blocks(start: int, stop: int, columns: int) -> Iterator[slice]:
    """Blocks of rows of at most BLOCK_BYTES in float32, a row at least."""
    step = max(1, BLOCK_BYTES // (4 * max(1, columns)))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def check_finite(values: torch.Tensor, name: str, path: Path) -> None:
    """Raise CheckpointError, naming the tensor, for NaN or infinity."""
    # A sum is finite only if its terms are, and costs no mask; a sum that overflowed is looked at again.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")


class Tally:
    """The energy of the delta of every part that was noted, and whether any of it is more than rounding."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._energies: dict[tuple[str, str], float] = {}
        self._real: set[tuple[str, str]] = set()

    @property
    def real(self) -> bool:
        """Whether some weight moved farther than storing base and tuned in their dtypes can move it."""
        return bool(self._real)

    def energy(self, part: Part) -> float:
        """What was noted of one part: the squared Frobenius norm of its delta."""
        return self._energies.get((part.tensor, part.kind), 0.0)

    def add(self, part: Part, energy: float) -> None:
        """Note an energy that is known already, and is no rounding: that of an adapter's factors."""
        key = (part.tensor, part.kind)
        self._energies[key] = self._energies.get(key, 0.0) + energy
        if energy:
            self._real.add(key)

    def note(self, part: Part, first: torch.Tensor, second: torch.Tensor, dtypes: tuple[str, str]) -> None:
        """Note some rows of `part` before and after, float32, stored in `dtypes`."""
        key = (part.tensor, part.kind)
        delta = second.double() - first.double()
        energy = float(delta.square().sum())
        self._energies[key] = self._energies.get(key, 0.0) + energy
        if energy and key not in self._real:
            reach = _half_ulp(first, dtypes[0]) + _half_ulp(second, dtypes[1])
            if (delta.abs_() > reach).any():
                self._real.add(key)

    def note_rest(self, changed: Iterable[str], before: Checkpoint, after: Checkpoint) -> None:
        """Note what was not noted yet of the tensors named `changed`, each in one of the two at least."""
        for name in sorted(changed):
            for part in parts(name, after if name in after.tensors else before, self._model):
                if (part.tensor, part.kind) not in self._energies:
                    self._compare(part, _Place.of(part, before), _Place.of(part, after))

    def note_replaced(self, names: Mapping[str, str], before: Checkpoint, adapter: Checkpoint) -> None:
        """Note the tensors that an adapter stores whole: `names` gives its own for those of the base."""
        for tensor, name in sorted(names.items()):
            new = _Place(adapter, name)
            known = tensor in before.tensors
            for part in (
                parts(tensor, before, self._model)
                if known
                else [Part(tensor, kind_of(tensor, self._model), 0, new.rows)]
            ):
                self._compare(part, _Place.of(part, before), new)

    def _compare(self, part: Part, old: _Place | None, new: _Place | None) -> None:
        places = [place for place in (old, new) if place is not None]
        if not all(place.readable for place in places):
            return
        fused = part.start > 0 or part.stop < min(place.rows for place in places)
        common = part.start
        if old and new and old.columns == new.columns:
            common = min(part.stop, old.rows, new.rows)
            for rows in row_blocks(part.start, common, old.columns):
                self.note(part, old.read(rows), new.read(rows), (old.dtype, new.dtype))
        # Rows that only one of the two has, such as those of new tokens, are a change as a whole.
        for place in places:
            stop = min(place.rows, part.stop) if fused else place.rows
            for rows in row_blocks(common, stop, place.columns):
                self.add(part, float(place.read(rows).double().square().sum()))

    def shares(self, read: Collection[tuple[str, str]]) -> tuple[DeltaShare, ...]:
        """By kind, where the delta is; `read` holds tensor and kind of the parts that a bank has directions of."""
        total = sum(self._energies[key] for key in sorted(self._energies))
        if not total:
            return ()
        shares = []
        for kind in KINDS:
            keys = sorted(key for key, energy in self._energies.items() if key[1] == kind and energy)
            if keys:
                shares.append(
                    DeltaShare(
                        kind=kind,
                        share=sum(self._energies[key] for key in keys) / total,
                        read=sum(self._energies[key] for key in keys if key in read) / total,
                        tensors=len(keys),
                        first=ascii(keys[0][0])[1:-1][:MAX_TEXT],
                    )
                )
        return tuple(shares)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor is read from."""

    weights: Checkpoint
    name: str

    @classmethod
    def of(cls, part: Part, weights: Checkpoint) -> _Place | None:
        """What does `part`'s work in `weights`: its tensor, or the embedding that an absent head is tied to."""
        if part.tensor in weights.tensors:
            return cls(weights, part.tensor)
        if part.kind != "lm_head":
            return None
        embeddings = (name for name in weights.tensors if name.endswith("embed_tokens.weight"))
        return next((cls(weights, name) for name in embeddings), None)

    @property
    def dtype(self) -> str:
        return self.weights.entry(self.name).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.entry(self.name).shape

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def readable(self) -> bool:
        """Whether it holds weights: counters and flags do not say how far a model moved."""
        return self.dtype in FLOAT_DTYPES and len(self.shape) > 0 and prod(self.shape) > 0

    def read(self, rows: slice) -> torch.Tensor:
        values = self.weights.rows(self.name, rows.start, rows.stop)
        check_finite(values, self.name, self.weights.path)
        return values


def kind_of(tensor: str, model: Model) -> str:
    """The kind of a tensor that is not fused."""
    place = model.layer_part(tensor)
    module = tensor.split(".")[-2] if "." in tensor else ""
    if place is None:
        outside = {"embed_tokens": "embed", "lm_head": "lm_head", "norm": "norms"}
        return outside.get(module, "other") if tensor.endswith(".weight") else "other"
    if tensor.endswith(".bias"):
        return "biases"
    if "norm" in module:
        return "norms"
    return module if module in KINDS else "other"


def _half_ulp(values: torch.Tensor, dtype: str) -> torch.Tensor:
    eps = torch.finfo(getattr(torch, FLOAT_DTYPES[dtype])).eps
    return values.double().abs_().mul_(eps / 2.0).add_(SMALLEST[dtype])
