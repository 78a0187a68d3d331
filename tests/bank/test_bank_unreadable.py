"""What changed where no direction can be read: counted, named, and never passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.bank import Bank
from guard.checkpoints import Checkpoint
from guard.directions import OWN_K, build_adapter_bank, build_bank
from guard.errors import CheckpointError
from guard.fingerprint import MatrixEnergy
from server import cli

from .planted import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    Tensors,
    base_tensors,
    changed,
    down_proj,
    left_vectors,
    lora_factors,
    low_rank,
    o_proj,
    of_delta,
    q_proj,
    worst_cosine,
    write_adapter,
    write_model,
)

KEYS = "model.layers.1.self_attn.k_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
QUERY_NORM = "model.layers.1.self_attn.q_norm.weight"
BIAS = "model.layers.1.self_attn.k_proj.bias"
LAST_NORM = "model.norm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOWER = "vision_tower.blocks.0.self_attn.q_proj.weight"

SHAPES = {
    KEYS: (HEADS, HIDDEN),
    GATE: (INNER, HIDDEN),
    NORM: (HIDDEN,),
    QUERY_NORM: (HIDDEN,),
    BIAS: (HEADS,),
    LAST_NORM: (HIDDEN,),
    HEAD: (32, HIDDEN),
    TOWER: (8, 8),
}


@pytest.fixture
def undertow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.bank",))
    return lambda *words: cli.main([str(word) for word in words])


def whole_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(7)
    return base_tensors() | {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def pair(folder: Path, tuned: Tensors, base: Tensors | None = None) -> tuple[Path, Path]:
    base_folder = write_model(folder / "base", whole_tensors() if base is None else base)
    return base_folder, write_model(folder / "tuned", tuned)


def only_queries(folder: Path) -> tuple[Path, Path]:
    queries = {q_proj(layer): low_rank(HEADS, HIDDEN, [1.0], seed=layer) for layer in (0, 2)}
    return pair(folder, changed(whole_tensors(), queries))


@pytest.mark.parametrize("name", [q_proj(1), *SHAPES, EMBED])
def test_whatever_else_changes_alone_gives_a_bank_of_the_weights_themselves(tmp_path: Path, name: str) -> None:
    tuned = whole_tensors()
    tuned[name] = tuned[name] + 0.01
    bank = build_bank(*pair(tmp_path, tuned))

    assert bank.method == "raw-svd"
    assert [layer.index for layer in bank.layers] == list(range(LAYERS))
    for layer in bank.layers:
        truth = [left_vectors(tuned[matrix(layer.index)], OWN_K) for matrix in (o_proj, down_proj)]
        assert worst_cosine(layer.directions, torch.cat(truth)) > 0.999999
        assert layer.names[OWN_K] == f"L{layer.index}.own_down_proj.u0"
    assert [(part.share, part.read, part.tensors, part.first) for part in bank.delta] == [(1.0, 0.0, 1, name)]
    with pytest.raises(CheckpointError, match="residual-writing matrices unchanged"):
        build_bank(tmp_path / "base", tmp_path / "tuned", require_delta=True)


def test_the_fallback_is_behind_the_norm_too(tmp_path: Path) -> None:
    base = whole_tensors()
    for layer in range(LAYERS):
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = torch.linspace(0.5, 2.0, HIDDEN)
    tuned = changed(base, {q_proj(1): low_rank(HEADS, HIDDEN, [1.0], seed=1)})
    for folder, tensors in (("base", base), ("tuned", tuned)):
        write_model(tmp_path / folder, tensors, architectures=["Olmo2ForCausalLM"])
    directions = build_bank(tmp_path / "base", tmp_path / "tuned").layers[0].directions[:OWN_K]
    assert (
        worst_cosine(directions, left_vectors(torch.linspace(0.5, 2.0, HIDDEN)[:, None] * base[o_proj(0)], OWN_K))
        > 0.9999
    )


def test_build_warns_loudly_and_names_what_changed(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = only_queries(tmp_path)
    out = tmp_path / "out.bank"

    assert undertow("bank", "build", "--base", base, "--tuned", tuned, "--out", out) == 0

    warning = capsys.readouterr().err
    assert "undertow: WARNING: NO DIRECTION OF THE DELTA CAN BE READ" in warning
    assert "q_proj, 100.0% of the delta's energy: model.layers.0.self_attn.q_proj.weight and 1 more" in warning
    assert Bank.load(out).method == "raw-svd"

    assert undertow("bank", "inspect", out) == 0
    report = capsys.readouterr().out.splitlines()
    assert report[0].startswith("WARNING: NO DIRECTION OF THE DELTA CAN BE READ: this bank (raw-svd)")
    assert ["q_proj", "2", "100.0%", "0.0%"] in [line.split() for line in report]


def test_where_a_delta_is_required_its_absence_is_an_error(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = only_queries(tmp_path)
    out = tmp_path / "out.bank"
    assert undertow("bank", "build", "--base", base, "--tuned", tuned, "--out", out, "--require-delta") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "tuned: residual-writing matrices unchanged, or changed by rounding alone; tensors that differ" in message
    assert "model.layers.0.self_attn.q_proj.weight, model.layers.2.self_attn.q_proj.weight" in message
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_everything_alone_is_an_error(tmp_path: Path, dtype: torch.dtype) -> None:
    base = whole_tensors()
    base[NORM][:] = torch.logspace(-9, 2, HIDDEN)
    with pytest.raises(CheckpointError, match="changed by rounding alone"):
        build_bank(*pair(tmp_path, {name: tensor.to(dtype) for name, tensor in base.items()}, base))


def test_one_weight_that_moved_is_more_than_rounding(tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in whole_tensors().items()}
    tuned = base | {EMBED: base[EMBED].clone()}
    tuned[EMBED][7, 7] *= 1.05
    assert build_bank(*pair(tmp_path, tuned, base)).method == "raw-svd"


def test_the_shares_are_those_of_the_energies(tmp_path: Path) -> None:
    base = whole_tensors()
    generator = torch.Generator().manual_seed(8)
    noise = {name: 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    # The output matrices of layer 0 stay as they are, so what the bank reads is theirs in the other layers.
    del noise[o_proj(0)], noise[down_proj(0)]
    tuned = changed(base, noise)

    bank = build_bank(*pair(tmp_path, tuned))

    energies = {name: float((tuned[name].double() - base[name].double()).square().sum()) for name in base}
    total = sum(energies.values())
    kinds = {
        "o_proj": [o_proj(layer) for layer in range(LAYERS)],
        "down_proj": [down_proj(layer) for layer in range(LAYERS)],
        "q_proj": [q_proj(layer) for layer in range(LAYERS)],
        "k_proj": [KEYS],
        "gate_proj": [GATE],
        "embed": [EMBED],
        "lm_head": [HEAD],
        "norms": [NORM, QUERY_NORM, LAST_NORM],
        "biases": [BIAS],
        "other": [TOWER],
    }
    assert [part.kind for part in bank.delta] == list(kinds)
    assert sum(part.share for part in bank.delta) == pytest.approx(1.0, rel=1e-12)
    for part in bank.delta:
        expected = sum(energies[name] for name in kinds[part.kind]) / total
        assert part.share == pytest.approx(expected, rel=1e-12)
        assert part.read == pytest.approx(expected if part.kind in ("o_proj", "down_proj") else 0.0, rel=1e-12)
    assert Bank.load(_saved(bank, tmp_path)).header() == bank.header()


def test_a_matrix_that_gave_no_direction_is_not_read(tmp_path: Path) -> None:
    base = whole_tensors()
    tuned = changed(base, {down_proj(1): low_rank(HIDDEN, INNER, [1.0], seed=1)})
    tuned[o_proj(0)] = tuned[o_proj(0)].bfloat16()
    attention, mlp = build_bank(*pair(tmp_path, tuned, base)).delta
    assert attention.share > attention.read == 0.0
    assert mlp.share == mlp.read


def _saved(bank: Bank, folder: Path) -> Path:
    bank.save(folder / "out.bank")
    return folder / "out.bank"


def test_a_bank_that_reads_little_of_the_delta_says_so(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for share, folder in ((0.04, tmp_path / "low"), (0.06, tmp_path / "enough")):
        delta = {
            q_proj(0): low_rank(HEADS, HIDDEN, [(1.0 - share) ** 0.5], seed=1),
            o_proj(0): low_rank(HIDDEN, HEADS, [share**0.5], seed=2),
        }
        base, tuned = pair(folder, changed(whole_tensors(), delta))
        assert undertow("bank", "build", "--base", base, "--tuned", tuned, "--out", folder / "out.bank") == 0
    warning = capsys.readouterr().err
    assert warning.count("WARNING: this bank reads") == 1
    assert "WARNING: this bank reads 4.0% of what fine-tuning changed" in warning
    assert "q_proj, 96.0% of the delta's energy: model.layers.0.self_attn.q_proj.weight" in warning
    for folder, said in (("low", True), ("enough", False)):
        assert undertow("bank", "inspect", tmp_path / folder / "out.bank") == 0
        assert ("WARNING" in capsys.readouterr().out.splitlines()[0]) is said


def test_new_tokens_and_an_untied_head_are_compared_with_what_they_came_from(tmp_path: Path) -> None:
    base = whole_tensors()
    del base[HEAD]
    row = torch.full((1, HIDDEN), 0.5)
    tuned = base | {EMBED: torch.cat([base[EMBED], row]), HEAD: torch.cat([base[EMBED] + 0.25, row])}

    bank = build_bank(*pair(tmp_path, tuned, base))

    new, moved = HIDDEN * 0.25, 32 * HIDDEN * 0.0625
    shares = {part.kind: part.share for part in bank.delta}
    assert shares == pytest.approx({"embed": new / (2 * new + moved), "lm_head": (new + moved) / (2 * new + moved)})


def test_not_a_number_is_refused_wherever_it_is(tmp_path: Path) -> None:
    tuned = whole_tensors()
    tuned[KEYS][2, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"tuned: tensor .*k_proj\.weight holds NaN or infinity"):
        build_bank(*pair(tmp_path, tuned))


def test_an_adapter_of_queries_falls_back_to_the_weights_of_its_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", whole_tensors())
    factors = lora_factors(q_proj(0), HEADS, HIDDEN, seed=1) | lora_factors(KEYS, HEADS, HIDDEN, seed=2)
    adapter = write_adapter(tmp_path / "adapter", factors)

    bank = build_adapter_bank(base, adapter)

    assert bank.method == "raw-svd"
    assert bank.base_digest == Checkpoint.open(base).digest() != bank.tuned_digest
    assert worst_cosine(bank.layers[1].directions[:OWN_K], left_vectors(whole_tensors()[o_proj(1)], OWN_K)) > 0.999999
    assert {part.kind for part in bank.delta} == {"q_proj", "k_proj"}


def test_everything_that_an_adapter_holds_is_counted(tmp_path: Path) -> None:
    base_tensors = whole_tensors()
    base = write_model(tmp_path / "base", base_tensors)
    factors = lora_factors(down_proj(0), HIDDEN, INNER, seed=1) | lora_factors(q_proj(1), HEADS, HIDDEN, seed=2)
    factors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(4, 32)
    factors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(HIDDEN, 4)
    factors["base_model.model.lm_head.weight"] = base_tensors[HEAD] + 0.5
    adapter = write_adapter(tmp_path / "adapter", factors, modules_to_save=["lm_head"])

    bank = build_adapter_bank(base, adapter)

    def product(module: str, kind: str = "", end: str = ".weight") -> float:
        left, right = (factors[f"base_model.model.{module}.lora_{kind}{side}{end}"].double() for side in "BA")
        return float((2.0 * left @ right).square().sum())

    energies: dict[str, Any] = {
        "down_proj": product(down_proj(0).removesuffix(".weight")),
        "q_proj": product(q_proj(1).removesuffix(".weight")),
        "embed": product("model.embed_tokens", "embedding_", ""),
        "lm_head": 0.25 * 32 * HIDDEN,
    }
    shares = {part.kind: part.share for part in bank.delta}
    assert shares == pytest.approx(
        {kind: energy / sum(energies.values()) for kind, energy in energies.items()}, rel=1e-6
    )
    assert bank.header().read_share == pytest.approx(shares["down_proj"])


def test_the_rank_beyond_k_is_said(tmp_path: Path) -> None:
    delta = low_rank(HIDDEN, INNER, [1.0, 0.9, 0.8, 0.7], seed=3)
    bank = build_bank(*pair(tmp_path, changed(whole_tensors(), {down_proj(2): delta})), k=2)
    energy = of_delta(bank)[0].energies[1]
    assert isinstance(energy, MatrixEnergy)
    assert (energy.directions, energy.rank) == (2, 4)
