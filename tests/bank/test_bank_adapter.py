"""An adapter's bank from its factors is that of the merged model; adapters that are more are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.adapters import Adapter
from guard.checkpoints import Checkpoint
from guard.directions import build_adapter_bank, build_bank
from guard.errors import CheckpointError, UnsupportedModelError

from .planted import (
    HEADS,
    HIDDEN,
    INNER,
    Tensors,
    base_tensors,
    changed,
    down_proj,
    lora_factors,
    o_proj,
    of_delta,
    q_proj,
    worst_cosine,
    write_adapter,
    write_model,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", base_tensors())


def two_matrices(rank: int = 4) -> Tensors:
    return lora_factors(o_proj(0), HIDDEN, HEADS, rank, seed=1) | lora_factors(down_proj(2), HIDDEN, INNER, 4, seed=2)


def merged(factors: Tensors, scalings: dict[str, float]) -> Tensors:
    deltas = {}
    for weight, scaling in scalings.items():
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        deltas[weight] = scaling * (
            factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        )
    return changed(base_tensors(), deltas)


@pytest.mark.parametrize(
    ("rank", "config", "attention", "mlp"),
    [
        (4, {}, 2.0, 2.0),
        (4, {"use_rslora": True}, 4.0, 4.0),
        (2, {"rank_pattern": {"self_attn.o_proj": 2}}, 4.0, 2.0),
        (4, {"alpha_pattern": {"model.layers.2.mlp.down_proj": 20}}, 2.0, 5.0),
        (4, {"alpha_pattern": {r"layers\.0\..*": 12, "o_proj": 99}}, 3.0, 2.0),
        (2, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True}, 3 / 2**0.5, 4.0),
    ],
)
def test_the_adapter_bank_is_the_bank_of_the_merged_model(
    tmp_path: Path, base: Path, rank: int, config: dict[str, Any], attention: float, mlp: float
) -> None:
    factors = two_matrices(rank)
    adapter = write_adapter(tmp_path / "adapter", factors, **config)
    tuned = write_model(tmp_path / "merged", merged(factors, {o_proj(0): attention, down_proj(2): mlp}))

    ours, reference = build_adapter_bank(base, adapter, k=20), build_bank(base, tuned, k=20)

    assert [layer.names for layer in of_delta(ours)] == [layer.names for layer in of_delta(reference)]
    for ours_layer, layer in zip(of_delta(ours), of_delta(reference), strict=True):
        assert worst_cosine(ours_layer.directions, layer.directions.double()) > 0.9999
        assert ours_layer.singular_values == pytest.approx(layer.singular_values, rel=1e-5)
        assert [e.norm for e in ours_layer.energies] == pytest.approx([e.norm for e in layer.energies], rel=1e-5)
    assert ours.base_digest == reference.base_digest
    assert ours.tuned_digest != reference.tuned_digest


def test_a_rank_deficient_adapter_gives_fewer_directions(tmp_path: Path, base: Path) -> None:
    factors = lora_factors(o_proj(0), HIDDEN, HEADS)
    name = next(name for name in factors if "lora_B" in name)
    factors[name][:, 2:] = 0.0
    adapter = write_adapter(tmp_path / "adapter", factors)
    assert build_adapter_bank(base, adapter).layers[0].names == ("L0.o_proj.u0", "L0.o_proj.u1")


def test_k_limits_an_adapter_too(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", two_matrices())
    bank = build_adapter_bank(base, adapter, k=3)
    assert [len(layer.names) for layer in bank.layers] == [3, 3]
    assert bank.layers[0].energies[0].captured < 1.0


def test_modules_that_do_not_write_to_the_residual_stream_may_change_too(tmp_path: Path, base: Path) -> None:
    factors = two_matrices() | lora_factors(q_proj(0), HEADS, HIDDEN)
    factors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    adapter = write_adapter(tmp_path / "adapter", factors, modules_to_save=["lm_head"])
    assert len(build_adapter_bank(base, adapter).layers) == 2


def test_an_adapter_digest_covers_weights_and_scaling(tmp_path: Path, base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    factors = two_matrices()
    first = Adapter.open(write_adapter(tmp_path / "a", factors), checkpoint).digest()
    same = Adapter.open(write_adapter(tmp_path / "b", factors, rank_pattern={}, bias="none"), checkpoint).digest()
    louder = Adapter.open(write_adapter(tmp_path / "c", factors, lora_alpha=9), checkpoint).digest()
    name = next(iter(factors))
    other = Adapter.open(write_adapter(tmp_path / "d", factors | {name: factors[name] + 1}), checkpoint).digest()
    assert first == same
    assert len({first, louder, other}) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported yet"),
        ({"use_dora": True}, "use_dora: not supported yet"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: not supported yet"),
        ({"lora_bias": True}, "lora_bias: not supported yet"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: not supported yet"),
        ({"target_parameters": ["x"]}, "target_parameters: not supported yet"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' may change the base too"),
        ({"modules_to_save": ["model.layers.1.mlp.down_proj"]}, "modules_to_save: .*down_proj"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save: 'mlp'"),
    ],
)
def test_an_adapter_that_is_more_than_its_factors_is_refused(
    tmp_path: Path, base: Path, config: dict[str, Any], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", two_matrices(), **config)
    with pytest.raises(UnsupportedModelError, match=message):
        build_adapter_bank(base, adapter)


def test_a_whole_matrix_inside_an_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    factors = two_matrices() | {f"base_model.model.{down_proj(1)}": torch.zeros(HIDDEN, INNER)}
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj\.weight is not a LoRA factor"):
        build_adapter_bank(base, write_adapter(tmp_path / "adapter", factors))


def test_an_adapter_without_a_readable_delta_is_refused_where_one_is_required(tmp_path: Path, base: Path) -> None:
    values = q_proj(0).replace("q_proj", "v_proj")
    factors = lora_factors(q_proj(0), HEADS, HIDDEN) | lora_factors(values, HEADS, HIDDEN)
    with pytest.raises(CheckpointError, match="touches only q_proj, v_proj; residual-writing matrices unchanged"):
        build_adapter_bank(base, write_adapter(tmp_path / "adapter", factors), require_delta=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 3}, r"rank 4, but 3 in adapter_config\.json"),
        ({"r": 0}, r"field r: '0', expected a positive integer"),
        ({"r": True}, r"field r: 'True'"),
        ({"lora_alpha": None}, "field lora_alpha: 'None', expected a number"),
        ({"lora_alpha": float("nan")}, "field lora_alpha: 'nan'"),
        ({"rank_pattern": ["o_proj"]}, "field rank_pattern: expected"),
        ({"alpha_pattern": {"(": 1}}, "field alpha_pattern: .* is not a pattern"),
        ({"lora_alpha": 0}, "delta is zero in every residual-writing matrix"),
        ({"modules_to_save": 3}, "field modules_to_save: '3', expected a list of module names"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, base: Path, config: dict[str, Any], message: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", two_matrices(), **config)
    with pytest.raises(CheckpointError, match=message):
        build_adapter_bank(base, adapter)


def test_an_untrained_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    factors = {name: tensor * ("lora_A" in name) for name, tensor in two_matrices().items()}
    with pytest.raises(CheckpointError, match="never trained"):
        build_adapter_bank(base, write_adapter(tmp_path / "adapter", factors))


def test_factors_that_do_not_fit_the_base_are_refused(tmp_path: Path, base: Path) -> None:
    for place, (factors, message) in enumerate(
        [
            (lora_factors(o_proj(0), HIDDEN, HEADS + 1), r"B \[64, 4\] and A \[4, 97\], but the base has \[64, 96\]"),
            (lora_factors(o_proj(9), HIDDEN, HEADS), r"has no model\.layers\.9\.self_attn\.o_proj\.weight"),
            (dict([next(iter(two_matrices().items()))]), r"lora_B\.weight is missing"),
            ({name: tensor * float("nan") for name, tensor in two_matrices().items()}, "holds NaN or infinity"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            build_adapter_bank(base, write_adapter(tmp_path / f"adapter-{place}", factors))


def test_an_adapter_folder_without_readable_weights_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        build_adapter_bank(base, tmp_path / "nowhere")
    adapter = write_adapter(tmp_path / "adapter", two_matrices())
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, .* convert to safetensors"):
        build_adapter_bank(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not valid JSON"):
        build_adapter_bank(base, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected a JSON object"):
        build_adapter_bank(base, adapter)
