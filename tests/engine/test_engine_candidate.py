"""A bank can take another's place in a running model, or what differs is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard.bank import Bank, LayerBank
from guard.calibration import Calibration
from guard.control import Wanted
from guard.engine.candidate import Candidate, Surroundings, check_successor
from guard.engine.settings import EngineSettings
from guard.errors import BankError, CalibrationError, ConfigError
from guard.scores import BankSpace
from tests.guard.planted import ROLE_MAP, calibration

WEIGHTS = "sha256:" + "a" * 64


def bank(seed: int = 0, names: dict[int, tuple[str, ...]] | None = None, **changes: object) -> Bank:
    """Directions in the places of `SPACE`'s, unless told otherwise."""
    chance = torch.Generator().manual_seed(seed)
    space = calibration().space
    ends = torch.tensor(space.widths).cumsum(dim=0).tolist()
    places = zip(space.layers, space.widths, ends, strict=True)
    own = {layer: space.names[end - width : end] for layer, width, end in places}
    layers = []
    for index, each in (names or own).items():
        rows = torch.randn(len(each), 8, generator=chance)
        layers.append(LayerBank(index, rows / rows.norm(dim=1, keepdim=True), each, (1.0,) * len(each)))
    fields = {"base_digest": WEIGHTS, "tuned_digest": WEIGHTS, "method": "delta-svd", "k": 4, "model_class": "Llama"}
    return Bank.sealed(**{**fields, "hidden_size": 8, "num_layers": 9, "layers": layers, **changes})  # type: ignore[arg-type]


def names() -> dict[int, tuple[str, ...]]:
    return {layer.index: layer.names for layer in bank().layers}


def test_other_directions_in_the_same_places_can_take_the_old_ones_place() -> None:
    check_successor(Path("new.bank"), bank(1), bank(0))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"tuned_digest": "sha256:" + "b" * 64}, f"built for weights sha256:{'b' * 64}, served are {WEIGHTS}"),
        ({"num_layers": 10}, "10 layers of width 8, expected 9 of 8"),
        ({"names": {0: ("L0.o_proj.u0",)}}, "layer 0 has 1 directions of the delta, expected 0"),
    ],
)
def test_what_differs_is_named(other: dict[str, object], said: str) -> None:
    with pytest.raises(BankError) as caught:
        check_successor(Path("new.bank"), bank(1, **other), bank(0))  # type: ignore[arg-type]
    assert str(caught.value).startswith("new.bank: cannot take the place of the bank that guards: ")
    assert said in str(caught.value)


def test_a_direction_of_the_delta_is_not_one_of_the_models_own() -> None:
    """The ops read the one at every token and the other at decisions, into buffers of their sizes."""
    index = next(index for index, each in names().items() if any(".own_" in name for name in each))
    moved = {**names(), index: tuple(name.replace(".own_", ".") + "x" for name in names()[index])}
    with pytest.raises(BankError, match=f"layer {index} has .* of the delta, expected .*; layer {index} has 0 "):
        check_successor(Path("new.bank"), bank(1, moved), bank(0))


def put(folder: Path, some: Bank, made: Calibration) -> tuple[EngineSettings, Wanted]:
    some.save(folder / "bank")
    made.save(folder / "calibration")
    settings = EngineSettings(bank=folder / "bank", fingerprint="x", calibration=folder / "calibration")
    return settings, Wanted(fingerprint=some.fingerprint, calibration=made.digest())


def made_for(some: Bank) -> Calibration:
    return replace(calibration(), fingerprint=some.fingerprint, space=BankSpace.of(some))


def test_the_files_are_taken_where_they_are_what_is_wanted(tmp_path: Path) -> None:
    new = bank(1)
    settings, wanted = put(tmp_path, new, made_for(new))
    candidate = Candidate.read(wanted, settings, Surroundings(bank(0), ROLE_MAP, "float32"))
    assert (candidate.bank.fingerprint, candidate.calibration.digest()) == (wanted.fingerprint, wanted.calibration)


def test_a_bank_that_guards_already_is_not_read_again(tmp_path: Path) -> None:
    old = bank(0)
    settings, wanted = put(tmp_path, old, made_for(old))
    (tmp_path / "bank").unlink()
    assert Candidate.read(wanted, settings, Surroundings(old, ROLE_MAP, "float32")).bank is old


def test_files_that_are_not_what_is_wanted_are_refused(tmp_path: Path) -> None:
    old, now = bank(0), Surroundings(bank(0), ROLE_MAP, "float32")
    settings, wanted = put(tmp_path, old, made_for(old))
    other = "sha256:" + "c" * 64
    with pytest.raises(BankError, match=f"asked for is {other}"):
        Candidate.read(wanted.model_copy(update={"fingerprint": other}), settings, now)
    with pytest.raises(CalibrationError, match=f"asked for is {other}"):
        Candidate.read(wanted.model_copy(update={"calibration": other}), settings, now)
    with pytest.raises(ConfigError, match="started without a calibration"):
        Candidate.read(wanted, settings.model_copy(update={"calibration": None}), now)


def test_a_calibration_of_another_bank_dtype_or_template_is_refused(tmp_path: Path) -> None:
    old = bank(0)
    for changed, dtype, said in (
        (made_for(bank(1)), "float32", "made for the bank"),
        (made_for(old), "bfloat16", "made with dtype float32, this engine runs bfloat16"),
        (replace(made_for(old), roles=replace(ROLE_MAP, user=((98, 99),))), "float32", "another chat template"),
    ):
        settings, wanted = put(tmp_path, old, changed)
        wanted = wanted.model_copy(update={"fingerprint": old.fingerprint})
        with pytest.raises(CalibrationError, match=said):
            Candidate.read(wanted, settings, Surroundings(old, ROLE_MAP, dtype))


def test_what_was_loaded_does_not_change_with_its_file(tmp_path: Path) -> None:
    """`cp` writes into the file that a running engine was started with."""
    old = bank(0)
    settings, wanted = put(tmp_path, old, made_for(old))
    candidate = Candidate.read(wanted, settings, Surroundings(old, ROLE_MAP, "float32"))
    size = (tmp_path / "calibration").stat().st_size
    with (tmp_path / "calibration").open("r+b") as file:
        file.truncate(0)
        file.write(b"\xff" * size)
    assert candidate.calibration.digest() == wanted.calibration
