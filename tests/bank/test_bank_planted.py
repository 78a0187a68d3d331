"""A delta of known directions goes in; the bank must hold those directions, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guard.bank import random_bank
from guard.checkpoints import Checkpoint
from guard.directions import OWN_K, build_bank, default_k

from .planted import (
    HEADS,
    HIDDEN,
    INNER,
    base_tensors,
    changed,
    down_proj,
    left_vectors,
    low_rank,
    o_proj,
    of_delta,
    own,
    planted_pair,
    worst_cosine,
    write_model,
)

VALUES = [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("dtype", "cosine", "relative"),
    [(torch.float32, 0.999999, 1e-5), (torch.float16, 0.9999, 1e-3), (torch.bfloat16, 0.998, 5e-3)],
)
def test_a_planted_rank_three_delta_is_found_and_nothing_else(
    tmp_path: Path, dtype: torch.dtype, cosine: float, relative: float
) -> None:
    base = base_tensors(dtype)
    delta = low_rank(HIDDEN, INNER, VALUES, seed=5)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", changed(base, {down_proj(1): delta}))

    bank = build_bank(tmp_path / "base", tmp_path / "tuned", k=20)

    assert [layer.index for layer in of_delta(bank)] == [1]
    layer = of_delta(bank)[0]
    assert layer.names == ("L1.down_proj.u0", "L1.down_proj.u1", "L1.down_proj.u2")
    assert layer.directions.dtype == torch.float32
    assert worst_cosine(layer.directions, left_vectors(delta, 3)) > cosine
    assert layer.singular_values == pytest.approx(VALUES, rel=relative)
    energies = {energy.matrix: energy for energy in layer.energies}
    assert energies["o_proj"].directions == 0
    assert energies["o_proj"].norm == 0.0
    assert energies["down_proj"].captured > 0.99
    assert energies["down_proj"].norm == pytest.approx(sum(value**2 for value in VALUES) ** 0.5, rel=1e-2)


def test_the_bank_of_stored_weights_is_the_exact_decomposition_of_their_difference(tmp_path: Path) -> None:
    base = base_tensors(torch.bfloat16)
    tuned = changed(base, {o_proj(0): low_rank(HIDDEN, HEADS, VALUES, seed=6)})
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)

    layer = of_delta(build_bank(tmp_path / "base", tmp_path / "tuned", k=20))[0]

    stored = tuned[o_proj(0)].double() - base[o_proj(0)].double()
    assert worst_cosine(layer.directions, left_vectors(stored, 3)) > 0.999999
    assert layer.singular_values == pytest.approx(torch.linalg.svdvals(stored)[:3].tolist(), rel=1e-5)


def test_o_proj_rows_come_before_down_proj_rows(tmp_path: Path) -> None:
    base = base_tensors()
    attention, mlp = low_rank(HIDDEN, HEADS, [0.3, 0.2], seed=7), low_rank(HIDDEN, INNER, [0.9], seed=8)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", changed(base, {o_proj(2): attention, down_proj(2): mlp}))

    layer = of_delta(build_bank(tmp_path / "base", tmp_path / "tuned", k=20))[0]

    assert layer.names == ("L2.o_proj.u0", "L2.o_proj.u1", "L2.down_proj.u0")
    assert worst_cosine(layer.directions, torch.cat([left_vectors(attention, 2), left_vectors(mlp, 1)])) > 0.999999


def test_no_more_than_k_directions_per_matrix_are_kept(tmp_path: Path) -> None:
    base, tuned = planted_pair(tmp_path)
    layer = of_delta(build_bank(base, tuned, k=2))[0]
    assert layer.names == ("L1.down_proj.u0", "L1.down_proj.u1")
    assert layer.energies[1].captured == pytest.approx((1 + 0.25) / (1 + 0.25 + 0.0625), rel=1e-4)


def test_the_largest_component_of_every_direction_is_positive(tmp_path: Path) -> None:
    base, tuned = planted_pair(tmp_path)
    directions = of_delta(build_bank(base, tuned, k=20))[0].directions
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_two_builds_have_one_fingerprint(tmp_path: Path) -> None:
    base, tuned = planted_pair(tmp_path)
    assert build_bank(base, tuned, k=20).fingerprint == build_bank(base, tuned, k=20).fingerprint


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = changed(base, {down_proj(1): low_rank(HIDDEN, INNER, VALUES, seed=5)})
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_model(tmp_path / name, tensors)
        write_model(tmp_path / f"{name}-sharded", tensors, shards=4)

    whole = build_bank(tmp_path / "base", tmp_path / "tuned", k=20)
    sharded = build_bank(tmp_path / "base-sharded", tmp_path / "tuned-sharded", k=20)

    assert sharded.fingerprint == whole.fingerprint


def test_a_bfloat16_base_and_a_float32_tuned_model_are_compared_in_float32(tmp_path: Path) -> None:
    base = base_tensors(torch.bfloat16)
    delta = low_rank(HIDDEN, INNER, VALUES, seed=5)
    wide = {name: tensor.float() for name, tensor in base.items()}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", changed(wide, {down_proj(1): delta}))
    layer = of_delta(build_bank(tmp_path / "base", tmp_path / "tuned", k=20))[0]
    assert worst_cosine(layer.directions, left_vectors(delta, 3)) > 0.999999


def test_a_norm_after_the_matrix_scales_its_directions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    gain = 1.0 + 0.5 * torch.rand(HIDDEN, generator=generator)
    base = base_tensors()
    for layer in range(3):
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = gain.clone()
    delta = low_rank(HIDDEN, INNER, VALUES, seed=5)
    tuned = changed(base, {down_proj(1): delta})
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_model(tmp_path / "olmo" / name, tensors, architectures=["Olmo2ForCausalLM"])
        write_model(tmp_path / "gemma" / name, tensors, architectures=["Gemma2ForCausalLM"])

    olmo = of_delta(build_bank(tmp_path / "olmo/base", tmp_path / "olmo/tuned", k=20))[0].directions
    gemma = of_delta(build_bank(tmp_path / "gemma/base", tmp_path / "gemma/tuned", k=20))[0].directions

    assert worst_cosine(olmo, left_vectors(gain[:, None].double() * delta, 3)) > 0.99999
    # Gemma stores the norm's weight less one.
    assert worst_cosine(gemma, left_vectors((1.0 + gain[:, None].double()) * delta, 3)) > 0.99999


def test_beside_the_delta_stand_the_directions_of_the_tuned_model_itself(tmp_path: Path) -> None:
    base, tuned = planted_pair(tmp_path)
    bank = build_bank(base, tuned, k=2)
    assert [layer.index for layer in own(bank)] == [0, 1, 2]
    for layer, index in zip(own(bank), range(3), strict=True):
        weights = Checkpoint.open(tuned)
        truth = [left_vectors(weights.read(matrix(index)), OWN_K) for matrix in (o_proj, down_proj)]
        assert worst_cosine(layer.directions, torch.cat(truth)) > 0.999999
        assert (layer.names[0], layer.names[OWN_K]) == (f"L{index}.own_o_proj.u0", f"L{index}.own_down_proj.u0")
    # They are no part of what changed.
    assert bank.header().read_share == 1.0


def test_a_random_bank_has_the_shapes_and_names_but_not_the_directions(tmp_path: Path) -> None:
    base, tuned = planted_pair(tmp_path)
    bank = build_bank(base, tuned, k=20)

    control = random_bank(bank, seed=1)

    assert control.method == "random"
    assert control.fingerprint != bank.fingerprint
    assert (control.base_digest, control.tuned_digest) == (bank.base_digest, bank.tuned_digest)
    for ours, theirs in zip(control.layers, bank.layers, strict=True):
        assert ours.names == theirs.names
        assert ours.directions.shape == theirs.directions.shape
        assert ours.directions.norm(dim=1).tolist() == pytest.approx([1.0] * len(ours.names), abs=1e-6)
        assert (ours.directions * theirs.directions).sum(dim=1).abs().max() < 0.7
    assert random_bank(bank, seed=1).fingerprint == control.fingerprint
    assert random_bank(bank, seed=2).fingerprint != control.fingerprint


@pytest.mark.parametrize(("hidden", "k"), [(1, 1), (8, 4), (39, 19), (40, 20), (128, 20), (4096, 20)])
def test_only_a_very_narrow_model_gives_fewer_directions_by_default(hidden: int, k: int) -> None:
    assert default_k(hidden) == k


def test_the_default_holds_for_whoever_asks_for_none(tmp_path: Path) -> None:
    base = base_tensors()
    write_model(tmp_path / "base", base)
    values = torch.linspace(1.0, 0.5, 30).tolist()
    write_model(tmp_path / "tuned", changed(base, {down_proj(1): low_rank(HIDDEN, INNER, values, seed=5)}))

    bank = build_bank(tmp_path / "base", tmp_path / "tuned")

    assert bank.k == default_k(HIDDEN) == 20
    attention, mlp = of_delta(bank)[0].energies
    assert (attention.directions, attention.rank) == (0, 0)
    assert mlp.directions == 20
    # In doubt a direction counts: storage in float32 may add one.
    assert 30 <= mlp.rank <= 32
