"""One safetensors file, read without torch: a header that is checked before anything believes it, then bytes.

The format is eight bytes of header length, a JSON header, and the tensors' bytes. A file that comes from somewhere else
may say anything in its header, so every number is compared with the file's size before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, TypeGuard

from guard.errors import CheckpointError, InputError

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

# The reference implementation's own limit; an 8-byte length could ask for any amount of memory.
MAX_HEADER_BYTES = 100_000_000

# More than any tensor of a model has; their product is taken before it can be compared with the file's size.
MAX_DIMENSIONS = 32

# Pickles are zip archives or start with the PROTO opcode; both are named so that the message can say what to do.
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: row-major, little-endian, `nbytes` from `offset` in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The checked header of one safetensors file."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, error: type[InputError] = CheckpointError) -> Shard:
        """Read and check the header of `path`.

        Raises `error`, naming the file, when the file is absent, a pickle, shorter or longer than its header says, or
        when the header is not what the format allows.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                return _parse(path, file, size)
        except OSError as cause:
            raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
        except _MalformedError as cause:
            raise error(f"{path}: {cause}") from cause


def read_bytes(entry: TensorEntry, start: int = 0, stop: int | None = None) -> bytearray:
    """The bytes `start:stop` of one tensor, in memory of their own.

    Raises CheckpointError when the file became shorter since its header was read.
    """
    buffer = bytearray((entry.nbytes if stop is None else stop) - start)
    try:
        with entry.shard.open("rb", buffering=0) as file:
            file.seek(entry.offset + start)
            read_into(file, memoryview(buffer), entry)
    except OSError as cause:
        raise CheckpointError(f"{entry.shard}: cannot be read: {cause.strerror or cause}") from cause
    return buffer


def read_into(file: IO[bytes], view: memoryview, entry: TensorEntry) -> None:
    """Fill `view` from an unbuffered file, or raise CheckpointError: one read may return less than was asked."""
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{entry.shard}: ends within tensor {entry.name}: the file is truncated")
        filled += count


class _MalformedError(Exception):
    """The header breaks the format; the caller adds the file's name."""


def _parse(path: Path, file: IO[bytes], size: int) -> Shard:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    # A short header length can begin with the same bytes as a pickle; one that does not fit the file is no length.
    if (len(start) < 8 or 8 + length > size) and start.startswith(PICKLE_STARTS):
        raise _MalformedError("is a pickle, which can run code when loaded and is never opened; convert to safetensors")
    if len(start) < 8:
        raise _MalformedError(f"is truncated: {size} bytes, expected at least 8")
    if length > MAX_HEADER_BYTES:
        raise _MalformedError(f"is not safetensors: header length {length}, expected at most {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise _MalformedError(f"is truncated or not safetensors: header length {length}, but the file has {size} bytes")
    header = _json_object(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _MalformedError("header field __metadata__: expected strings only")
    tensors = {name: _entry(name, fields, path, 8 + length) for name, fields in header.items()}
    _check_layout(tensors, 8 + length, size)
    return Shard(path, tensors, metadata)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as cause:
        raise _MalformedError(f"is not safetensors: the header is not JSON ({type(cause).__name__})") from cause
    if not isinstance(header, dict):
        raise _MalformedError("is not safetensors: the header is not a JSON object")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _MalformedError("header names the same key twice")
    return fields


def _entry(name: str, fields: Any, path: Path, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        raise _MalformedError(f"tensor {name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _MalformedError(f"tensor {name}: unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _MalformedError(f"tensor {name}: shape is not a list of natural numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _MalformedError(f"tensor {name}: data_offsets is not [begin, end]")
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * DTYPE_BITS[dtype] != nbytes * 8:
        raise _MalformedError(f"tensor {name}: shape {shape} of {dtype} does not fill its {nbytes} bytes")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Tensors must lie end to end and fill the file: no overlap, no gap that hides bytes, nothing missing."""
    position = data_start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise _MalformedError(f"tensor {entry.name}: starts at byte {entry.offset}, expected {position}")
        position += entry.nbytes
    if position != size:
        kind = "is truncated" if position > size else "has bytes that no tensor owns"
        raise _MalformedError(f"{kind}: {size} bytes, but the header describes {position}")
