"""Digests that bind a bank to weights, and the reading of tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.checkpoints import CHUNK_BYTES, Checkpoint
from guard.errors import CheckpointError, InputError
from guard.shards import Shard

from .planted import base_tensors, down_proj, write_model


def digest(folder: Path) -> str:
    return Checkpoint.open(folder).digest()


def test_the_digest_does_not_depend_on_sharding_or_order(tmp_path: Path) -> None:
    tensors = base_tensors()
    backwards = dict(reversed(tensors.items()))
    digests = {
        digest(write_model(tmp_path / "one", tensors)),
        digest(write_model(tmp_path / "two", tensors, shards=2)),
        digest(write_model(tmp_path / "five", backwards, shards=5)),
    }
    assert len(digests) == 1
    assert digests.pop().startswith("sha256:")


def test_one_flipped_bit_changes_the_digest(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", base_tensors())
    before = digest(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = digest(folder)
    content[-1] ^= 1
    file.write_bytes(content)
    assert after != before
    assert digest(folder) == before


def test_names_shapes_and_dtypes_are_part_of_the_digest(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 6)
    variants: list[dict[str, torch.Tensor]] = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(6, 4)},
        {"a": tensor.to(torch.int32)},
        {"a": tensor, "b": torch.zeros(0)},
    ]
    digests = {digest(write_model(tmp_path / str(place), tensors)) for place, tensors in enumerate(variants)}
    assert len(digests) == len(variants)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(CHUNK_BYTES + 3, dtype=torch.uint8), "b": torch.zeros(5), "c": torch.zeros(0)}
    checkpoint = Checkpoint.open(write_model(tmp_path / "model", tensors))
    counts: list[int] = []
    assert checkpoint.digest(counts.append) == checkpoint.digest()
    assert sum(counts) == checkpoint.nbytes() == CHUNK_BYTES + 3 + 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_the_rows_of_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = base_tensors(dtype)
    checkpoint = Checkpoint.open(write_model(tmp_path / "model", tensors, shards=3))
    expected = tensors[down_proj(1)].float()
    assert torch.equal(checkpoint.read(down_proj(1)), expected)
    assert torch.equal(checkpoint.rows(down_proj(1), 5, 9), expected[5:9])


def test_a_file_that_became_shorter_after_opening_is_an_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", base_tensors())
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ends within tensor"):
        checkpoint.digest()
    with pytest.raises(CheckpointError, match="ends within tensor"):
        checkpoint.read(down_proj(0))


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", base_tensors(), shards=2)
    (folder / "part-2.safetensors").write_bytes((folder / "part-1.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": names | {"extra": "part-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"is also in part-1\.safetensors"):
        Checkpoint.open(folder)


def one_tensor(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "not a JSON object"),
        ({"a": 3}, "tensor a: expected dtype, shape and data_offsets"),
        (one_tensor(dtype="F33"), "unknown dtype 'F33'"),
        (one_tensor(shape=[-2]), "not a list of natural numbers"),
        (one_tensor(shape=[True, 2]), "not a list of natural numbers"),
        (one_tensor(shape=[2**62, 2**62]), "does not fill its 8 bytes"),
        (one_tensor(shape=[1] * 40 + [2]), "shape is not"),
        (one_tensor(data_offsets=[8, 0]), "not \\[begin, end\\]"),
        (one_tensor(data_offsets=[4, 12]), "starts at byte"),
        (one_tensor(shape=[2**40], data_offsets=[0, 2**42]), "is truncated"),
        (one_tensor() | {"b": one_tensor()["a"]}, "starts at byte"),
        (one_tensor(shape=[1], data_offsets=[0, 4]), "has bytes that no tensor owns"),
        (one_tensor() | {"__metadata__": {"a": 1}}, "__metadata__: expected strings only"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    raw = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)
    with pytest.raises(CheckpointError, match=message):
        Shard.open(file)


def test_a_header_with_a_key_twice_or_no_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for raw, message in ((b'{"__metadata__":{},"__metadata__":{}}', "same key twice"), (b"[" * 100_000, "not JSON")):
        file.write_bytes(struct.pack("<Q", len(raw)) + raw)
        with pytest.raises(CheckpointError, match=message):
            Shard.open(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_safetensors_are_refused_or_read_never_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        write_model(folder, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)})
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    content = bytearray((folder / "whole").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=20))
    (folder / "model.safetensors").write_bytes(content)
    assert str(folder) in (_refusal(folder) or str(folder))


def _refusal(folder: Path) -> str | None:
    """Why a folder's tensors cannot be read, all of them; None when they can."""
    try:
        checkpoint = Checkpoint.open(folder)
        checkpoint.digest()
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except InputError as error:
        return str(error)
    return None
