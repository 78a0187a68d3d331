"""A model folder: which tensors it holds, one tensor at a time, and one digest of them all.

Nothing here imports torch before a tensor is asked for, so that the worker and the server can check which weights they
serve without waiting for anything but the disk.

    checkpoint = Checkpoint.open("models/tuned")
    checkpoint.digest()                                       # "sha256:…", the same however the weights are sharded
    checkpoint.rows("model.layers.0.mlp.down_proj.weight", 0, 64)     # torch.Tensor, float32
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from guard.errors import CheckpointError
from guard.shards import Shard, TensorEntry, read_bytes, read_into

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What can be read as float32, by the names that safetensors and torch give it.
FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Large enough that hashing, not calling, is the cost; small enough that a thread's buffer stays in cache.
CHUNK_BYTES = 1 << 20
HASH_THREADS = 8

Progress = Callable[[int], object]
StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of one model folder; opening reads headers only."""

    path: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: StrPath) -> Checkpoint:
        """List the tensors of a folder with `model.safetensors`, or shards and their index.

        Raises CheckpointError when the folder is absent, holds pickles only, is ambiguous about which file is the
        model, names shards or tensors that are absent, or has a file that is not safetensors.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder; expected a model folder with config.json and safetensors")
        tensors: dict[str, TensorEntry] = {}
        for file in _weight_files(folder):
            for name, entry in Shard.open(file).tensors.items():
                if name in tensors:
                    raise CheckpointError(f"{file}: tensor {name} is also in {tensors[name].shard.name}")
                tensors[name] = entry
        if not tensors:
            raise CheckpointError(f"{folder}: holds no tensors")
        _check_index(folder, tensors)
        return cls(folder, tensors)

    def config(self) -> dict[str, Any]:
        """`config.json` as a mapping. Raises CheckpointError when it is missing or not a JSON object."""
        return read_json(self.path / "config.json")

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of one tensor. Raises CheckpointError when the folder does not hold it."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing") from None

    def float_entry(self, name: str) -> TensorEntry:
        """`entry`, of a tensor that can be read as float32. Raises CheckpointError for other dtypes."""
        entry = self.entry(name)
        if entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{entry.shard}: tensor {name} has dtype {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            )
        return entry

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor as float32, in its stored shape. Raises CheckpointError for other than float dtypes."""
        entry = self.float_entry(name)
        return _to_float32(entry, read_bytes(entry)).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of a matrix as float32 [stop - start, columns], reading no more than those rows."""
        entry = self.float_entry(name)
        row_bytes = entry.nbytes // entry.shape[0]
        return _to_float32(entry, read_bytes(entry, start * row_bytes, stop * row_bytes)).reshape(
            stop - start, *entry.shape[1:]
        )

    def tensor_digests(self, progress: Progress | None = None) -> dict[str, str]:
        """SHA-256 (hex) of every tensor's stored bytes, by name. `progress` is called with bytes hashed since last."""
        largest_first = sorted(self.tensors.values(), key=lambda entry: -entry.nbytes)
        report = _serialised(progress)
        with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
            hashes = list(pool.map(lambda entry: _sha256(entry, report), largest_first))
        return {entry.name: value for entry, value in zip(largest_first, hashes, strict=True)}

    def digest(self, progress: Progress | None = None) -> str:
        """One digest of all weights, "sha256:" and 64 hex digits: what a bank is bound to.

        Covers every tensor's name, dtype, shape and bytes; not the file names, the sharding or the metadata, because a
        re-sharded model is the same model. Hashing runs in threads and never converts a tensor.
        """
        return self.combine(self.tensor_digests(progress))

    def combine(self, tensor_digests: Mapping[str, str]) -> str:
        """The digest of all weights, from the digests of the tensors."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            total.update(json.dumps([name, entry.dtype, entry.shape, tensor_digests[name]]).encode() + b"\n")
        return f"sha256:{total.hexdigest()}"

    def nbytes(self) -> int:
        """Bytes of all tensors, the total that `progress` reaches."""
        return sum(entry.nbytes for entry in self.tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises CheckpointError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError for a folder whose only weights are pickles: loading one can run code."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when loaded and is never opened; "
            "convert to safetensors"
        )


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.exists():
        if single.exists():
            return [single]
        refuse_pickles(folder)
        raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    shards = sorted(set(_weight_map(index).values()))
    if single.exists() and SINGLE_FILE not in shards:
        # transformers would load the one, vLLM the other: a guard must not have to guess which is served.
        raise CheckpointError(f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, which does not name it")
    for name in shards:
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: names shard {name}, which is absent")
    return [folder / name for name in shards]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: field weight_map: expected tensor names and their shards")
    for tensor, shard in weight_map.items():
        # A shard is a file beside its index; a path could lead anywhere on the machine.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: weight_map of {tensor}: {str(shard)[:80]!r}, expected a .safetensors file beside the index"
            )
    return weight_map


def _check_index(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    index = folder / INDEX_FILE
    if not index.exists():
        return
    for name, shard in _weight_map(index).items():
        if name not in tensors or tensors[name].shard.name != shard:
            raise CheckpointError(f"{index}: places tensor {name} in {shard}, which does not hold it")


def _to_float32(entry: TensorEntry, raw: bytearray) -> torch.Tensor:
    import torch

    if not raw:  # frombuffer refuses an empty buffer
        return torch.empty(0)
    return torch.frombuffer(raw, dtype=getattr(torch, FLOAT_DTYPES[entry.dtype])).float()


def _serialised(progress: Progress | None) -> Progress:
    """The callback behind a lock: progress bars do not expect several threads."""
    lock = Lock()

    def report(count: int) -> None:
        if progress is not None:
            with lock:
                progress(count)

    return report


def _sha256(entry: TensorEntry, report: Progress) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.nbytes)))
    try:
        with entry.shard.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            remaining = entry.nbytes
            while remaining:
                chunk = buffer[: min(remaining, len(buffer))]
                read_into(file, chunk, entry)
                digest.update(chunk)
                report(len(chunk))
                remaining -= len(chunk)
    except OSError as cause:
        raise CheckpointError(f"{entry.shard}: cannot be read: {cause.strerror or cause}") from cause
    return digest.hexdigest()
