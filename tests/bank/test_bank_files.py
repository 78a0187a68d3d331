"""A bank file comes back as it was saved, or is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from guard.bank import Bank, LayerBank, orient
from guard.errors import BankError
from guard.fingerprint import read_header


def small_bank() -> Bank:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for index in (1, 4):
        directions = orient(torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q.T)
        names = (f"L{index}.o_proj.u0", f"L{index}.down_proj.u0", f"L{index}.down_proj.u1")
        layers.append(LayerBank(index, directions, names, (2.0, 1.5, 0.5)))
    return Bank.sealed(
        base_digest="sha256:base",
        tuned_digest="sha256:tuned",
        method="delta-svd",
        k=2,
        model_class="LlamaForCausalLM",
        hidden_size=8,
        num_layers=6,
        layers=layers,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.bank"
    small_bank().save(path)
    return path


def test_what_was_saved_comes_back(file: Path) -> None:
    saved, loaded = small_bank(), Bank.load(file)
    assert loaded.header() == saved.header() == read_header(file)
    for before, after in zip(saved.layers, loaded.layers, strict=True):
        assert torch.equal(before.directions, after.directions)


def test_saving_twice_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    Bank.load(file).save(tmp_path / "again.bank")
    assert (tmp_path / "again.bank").read_bytes() == file.read_bytes()


def test_other_tools_can_read_the_file(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["undertow"])["format"] == 2
        assert opened.get_tensor("layers.4.directions").shape == (3, 8)


def test_the_fingerprint_is_about_content_alone() -> None:
    bank = small_bank()
    assert small_bank().fingerprint == bank.fingerprint
    other = LayerBank(1, bank.layers[0].directions.roll(1, dims=0), bank.layers[0].names, (2.0, 1.5, 0.5))
    fields = {name: getattr(bank, name) for name in ("base_digest", "tuned_digest", "method", "k", "model_class")}
    sizes = {"hidden_size": 8, "num_layers": 6}
    assert Bank.sealed(**fields, **sizes, layers=bank.layers).fingerprint == bank.fingerprint
    assert Bank.sealed(**fields, **sizes, layers=(other, bank.layers[1])).fingerprint != bank.fingerprint
    for name, value in (("base_digest", "x"), ("tuned_digest", "x"), ("method", "x"), ("k", 3), ("model_class", "x")):
        assert Bank.sealed(**fields | {name: value}, **sizes, layers=bank.layers).fingerprint != bank.fingerprint


def test_a_failed_save_leaves_the_old_file_and_no_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(BankError, match="No space left on device"):
        small_bank().save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["some.bank"]


def test_saving_where_there_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="nowhere does not exist"):
        small_bank().save(tmp_path / "nowhere" / "some.bank")
    with pytest.raises(BankError, match="is a folder"):
        small_bank().save(tmp_path)


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Change header and tensors of a bank file, leaving the fingerprint as it was."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["undertow"])
    tensors = load_file(file)
    change(header, tensors)
    save_file(tensors, file, metadata={"undertow": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: tensors["layers.1.directions"].mul_(-1), "field fingerprint: .* was changed after"),
        (lambda header, tensors: header.update(tuned_digest="sha256:other"), "field fingerprint"),
        (lambda header, tensors: header.update(k=3), "field fingerprint"),
        (lambda header, tensors: header.update(fingerprint="sha256:0"), "field fingerprint"),
        (lambda header, tensors: header["layers"][0].update(singular_values=[9.0, 1.5, 0.5]), "field fingerprint"),
        (lambda header, tensors: header.update(format=1), "field format: 1, expected 2"),
        (lambda header, tensors: header.pop("method"), "field method is missing"),
        (lambda header, tensors: header.update(k=True), "field k: 'True', expected int"),
        (lambda header, tensors: header.update(k=0), "field k: '0', expected 1 to"),
        (lambda header, tensors: header.update(hidden_size="8"), "field hidden_size: '8', expected int"),
        (
            lambda header, tensors: header.update(hidden_size=9),
            r"tensor layers\.1\.directions: .*expected F32 \(3, 9\)",
        ),
        (lambda header, tensors: header.update(num_layers=4), "layer 4: expected ascending indices below num_layers 4"),
        (lambda header, tensors: header.update(layers=[]), "field layers: empty"),
        (lambda header, tensors: header["layers"].reverse(), "layer 1: expected ascending"),
        (lambda header, tensors: header["layers"].pop(), r"tensor layers\.4\.directions is not in the header"),
        (lambda header, tensors: header["layers"][0].update(names=["a", "a", "b"]), "one distinct name"),
        (lambda header, tensors: header["layers"][0].update(names=["\x1b[2J", "a", "b"]), "printable"),
        (lambda header, tensors: header["layers"][1]["singular_values"].pop(), "2 values for 3 names"),
        (lambda header, tensors: header["layers"][1].update(singular_values=[1.0, -1.0, 1.0]), "zero or more"),
        (lambda header, tensors: header.update(layers=[3]), r"field layers\[0\]: expected an object"),
        (lambda header, tensors: tensors.pop("layers.4.directions"), r"tensor layers\.4\.directions is missing"),
        (lambda header, tensors: tensors.update({"x": torch.zeros(1)}), "tensor x is not in the header"),
        (
            lambda header, tensors: tensors.update({"layers.1.directions": tensors["layers.1.directions"].half()}),
            "F16 .*expected F32",
        ),
    ],
)
def test_a_tampered_file_is_refused(file: Path, change: Any, message: str) -> None:
    rewrite(file, change)
    with pytest.raises(BankError, match=message) as caught:
        Bank.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_directions_that_are_not_unit_vectors_are_refused(tmp_path: Path, value: float) -> None:
    bank = small_bank()
    bank.layers[1].directions[2] *= value
    fields = {name: getattr(bank, name) for name in ("base_digest", "tuned_digest", "method", "k", "model_class")}
    # Sealed anew, so that only the norm can be what is wrong.
    Bank.sealed(**fields, hidden_size=8, num_layers=6, layers=bank.layers).save(tmp_path / "some.bank")
    with pytest.raises(BankError, match=r"direction L4\.down_proj\.u1: norm (0\.5|nan), expected 1"):
        Bank.load(tmp_path / "some.bank")


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_refused_by_its_content_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.bank"
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(BankError, match="is a pickle"):
        Bank.load(path)
    torch.save(_Bomb(), path)
    with pytest.raises(BankError, match="is a pickle"):
        Bank.load(path)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_banks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="cannot be read: No such file"):
        Bank.load(tmp_path / "nothing.bank")
    with pytest.raises(BankError, match="cannot be read: Is a directory"):
        Bank.load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(BankError, match="not a bank: metadata key 'undertow' is missing"):
        Bank.load(tmp_path / "weights.safetensors")
    for text in ("[]", "{", "[" * 50_000):
        save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", metadata={"undertow": text})
        with pytest.raises(BankError, match="metadata key 'undertow' is not"):
            Bank.load(tmp_path / "weights.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_whatever_the_damage(file: Path, data: st.DataObject) -> None:
    whole = file.with_suffix(".whole")
    if not whole.exists():
        whole.write_bytes(file.read_bytes())
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    damaged = file.with_suffix(".damaged")
    damaged.write_bytes(content)
    assert str(damaged) in (_refusal(damaged) or str(damaged))


def _refusal(file: Path) -> str | None:
    try:
        bank = Bank.load(file)
    except BankError as error:
        return str(error)
    # The version that built it is all that may change unnoticed; two flips may also cancel.
    assert bank.fingerprint == small_bank().fingerprint
    return None
