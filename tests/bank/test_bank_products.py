"""A change of values, or of the MLP's upward matrix, is read through the matrix that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from guard.directions import build_adapter_bank, build_bank
from guard.errors import CheckpointError

from .planted import (
    HEADS,
    HIDDEN,
    INNER,
    base_tensors,
    changed,
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
from .test_bank_architectures import SIZES, VISION, decoder_layers

Q, KV, SIZE = 4, 2, 16  # heads, key-value heads, and a head size that is not hidden / heads
WIDE = SIZES | {"head_dim": SIZE}

CONFIGS: dict[str, Any] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**WIDE),
    "MistralForCausalLM": lambda: transformers.MistralConfig(**WIDE),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(**SIZES),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**WIDE),
    "Phi3ForCausalLM": lambda: transformers.Phi3Config(**SIZES),
    "Olmo2ForCausalLM": lambda: transformers.Olmo2Config(**SIZES),
    "Gemma2ForCausalLM": lambda: transformers.Gemma2Config(**WIDE),
    "Gemma3ForCausalLM": lambda: transformers.Gemma3TextConfig(**WIDE),
    "Gemma3ForConditionalGeneration": lambda: transformers.Gemma3Config(
        text_config=WIDE, vision_config=VISION, mm_tokens_per_image=4
    ),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]()).eval()
    with torch.no_grad():
        for layer in decoder_layers(model):
            for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
                if hasattr(layer, norm):
                    getattr(layer, norm).weight.add_(0.3 * torch.rand_like(getattr(layer, norm).weight))
    return model


def values_of(attention: Any) -> torch.Tensor:
    """The rows of v in whichever tensor holds them."""
    if hasattr(attention, "v_proj"):
        return attention.v_proj.weight
    return attention.qkv_proj.weight[-KV * attention.head_dim :]


def gain_of(model: Any, name: str) -> torch.Tensor:
    """What stands between o_proj and the residual stream in layer 0."""
    if not name.startswith(("Gemma", "Olmo")):
        return torch.ones(model.get_input_embeddings().weight.shape[1], dtype=torch.float64)
    weight = decoder_layers(model)[0].post_attention_layernorm.weight.detach().double()
    return weight + 1.0 if name.startswith("Gemma") else weight


def by_heads(gain: torch.Tensor, outer: torch.Tensor, delta: torch.Tensor, size: int) -> torch.Tensor:
    """Every head's product, side by side, in float64 and as slowly as it is said."""
    heads, groups = outer.shape[1] // size, delta.shape[0] // size
    pieces = []
    for head in range(heads):
        group = head // (heads // groups)
        pieces.append(
            outer[:, head * size : (head + 1) * size].double() @ delta[group * size : (group + 1) * size].double()
        )
    return gain[:, None] * torch.cat(pieces, dim=1)


def attention_outputs(model: Any) -> torch.Tensor:
    """What layer 0's o_proj puts out for a few tokens, float32 [tokens, hidden]."""
    seen = []
    hook = decoder_layers(model)[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with hook, torch.no_grad():
        model(input_ids=torch.arange(2, 26)[None])
    return seen[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_values_alone_is_read_through_the_output_matrix(tmp_path: Path, name: str) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "base")
    before = attention_outputs(model)
    attention, gain = decoder_layers(model)[0].self_attn, gain_of(model, name)
    with torch.no_grad():
        values = values_of(attention)
        old = values.clone()
        values += low_rank(*values.shape, [1.0, 0.5], seed=1).float()
        delta = values.double() - old.double()
        if getattr(attention, "v_proj", None) is not None and attention.v_proj.bias is not None:
            attention.v_proj.bias += 3.0
    model.save_pretrained(tmp_path / "tuned")

    bank = build_bank(tmp_path / "base", tmp_path / "tuned", k=20)

    # Two directions of v, each written by four heads.
    truth = by_heads(gain, attention.o_proj.weight.detach(), delta, attention.head_dim)
    (layer,) = of_delta(bank)
    assert layer.names == tuple(f"L0.ov_proj.u{rank}" for rank in range(8))
    assert 1.0 - worst_cosine(layer.directions, left_vectors(truth, 8)) < 1e-5
    assert layer.singular_values == pytest.approx(torch.linalg.svdvals(truth)[:8].tolist(), rel=1e-5)
    energies = {energy.matrix: energy for energy in layer.energies}
    assert energies["ov_proj"].norm == pytest.approx(float(truth.norm()), rel=1e-5)
    assert (energies["o_proj"].directions, energies["ov_proj"].rank) == (0, 8)
    read = {part.kind: part.read for part in bank.delta}
    assert read["v_proj"] > 0.0
    assert sum(read.values()) == read["v_proj"]

    if getattr(attention, "v_proj", None) is None or attention.v_proj.bias is None:
        # The model itself is the judge of heads, groups and slices: what it writes anew lies in these directions.
        difference = (attention_outputs(model) - before).double() * gain
        outside = difference - difference @ layer.directions.double().T @ layer.directions.double()
        assert float(outside.norm() / difference.norm()) < 1e-4


def test_a_bias_of_values_alone_shows_in_no_direction(tmp_path: Path) -> None:
    model = made("Qwen2ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        decoder_layers(model)[0].self_attn.v_proj.bias += 1.0
    model.save_pretrained(tmp_path / "tuned")
    bank = build_bank(tmp_path / "base", tmp_path / "tuned")
    assert bank.method == "raw-svd"
    assert [part.kind for part in bank.delta] == ["biases"]


def v_proj(layer: int) -> str:
    return q_proj(layer).replace("q_proj", "v_proj")


def up_proj(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


HEAD = HEADS // Q


def whole_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """`base_tensors` with values and upward matrices of their own."""
    tensors = base_tensors(dtype)
    generator = torch.Generator().manual_seed(9)
    for layer in range(3):
        tensors[v_proj(layer)] = (0.02 * torch.randn(KV * HEAD, HIDDEN, generator=generator)).to(dtype)
        tensors[up_proj(layer)] = (0.02 * torch.randn(INNER, HIDDEN, generator=generator)).to(dtype)
    return tensors


def written(tmp_path: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **config: Any) -> Any:
    config = {"num_attention_heads": Q} | config
    return write_model(tmp_path / "base", base, **config), write_model(tmp_path / "tuned", tuned, **config)


def test_a_merge_rounded_to_bfloat16_shows_its_directions_and_no_rounding(tmp_path: Path) -> None:
    base = whole_tensors(torch.bfloat16)
    delta = low_rank(KV * HEAD, HIDDEN, [1.0], seed=4)
    tuned = changed(base, {v_proj(1): delta})

    (layer,) = of_delta(build_bank(*written(tmp_path, base, tuned), k=20))

    assert layer.names == tuple(f"L1.ov_proj.u{rank}" for rank in range(Q))
    stored = tuned[v_proj(1)].double() - base[v_proj(1)].double()
    truth = by_heads(torch.ones(HIDDEN), base[o_proj(1)], stored, HEAD)
    assert 1.0 - worst_cosine(layer.directions, left_vectors(truth, Q)) < 1e-5


@pytest.mark.parametrize("name", [v_proj(1), up_proj(1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", ["LlamaForCausalLM", "Olmo2ForCausalLM"])
def test_rounding_alone_shows_in_no_direction(tmp_path: Path, name: str, dtype: torch.dtype, model_class: str) -> None:
    base = whole_tensors()
    for layer in range(3):
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = torch.full((HIDDEN,), 50.0)
    # Rows of very different size, and an output matrix with directions far stronger than the rest.
    base[o_proj(1)] += low_rank(HIDDEN, HEADS, [9.0], seed=3).float()
    base[name] *= torch.logspace(-2, 1, len(base[name]))[:, None]
    tuned = base | {name: base[name].to(dtype)}
    with pytest.raises(CheckpointError, match="changed by rounding alone"):
        build_bank(*written(tmp_path, base, tuned, architectures=[model_class]))
    # Beside a change that is more, it still shows in none.
    tuned |= changed(base, {q_proj(0): torch.ones(HEADS, HIDDEN)})
    tuned[name] = base[name].to(dtype)
    for folder in ("base", "tuned"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-before")
    bank = build_bank(*written(tmp_path, base, tuned, architectures=[model_class]))
    assert bank.method == "raw-svd"
    assert bank.header().read_share == 0.0


def test_the_upward_matrix_is_read_as_the_product_with_the_downward_one(tmp_path: Path) -> None:
    base = whole_tensors()
    tuned = changed(base, {up_proj(2): low_rank(INNER, HIDDEN, [1.0, 0.5, 0.25], seed=4)})

    (layer,) = of_delta(build_bank(*written(tmp_path, base, tuned), k=20))

    truth = base["model.layers.2.mlp.down_proj.weight"].double() @ (tuned[up_proj(2)] - base[up_proj(2)]).double()
    assert layer.names == ("L2.down_up.u0", "L2.down_up.u1", "L2.down_up.u2")
    assert 1.0 - worst_cosine(layer.directions, left_vectors(truth, 3)) < 1e-5


def test_a_changed_output_matrix_is_read_alone(tmp_path: Path) -> None:
    base = whole_tensors()
    both = {v_proj(0): low_rank(KV * HEAD, HIDDEN, [9.0], 4), o_proj(0): low_rank(HIDDEN, HEADS, [0.5], 5)}
    bank = build_bank(*written(tmp_path, base, changed(base, both)))
    assert of_delta(bank)[0].names == ("L0.o_proj.u0",)
    assert bank.header().read_share == pytest.approx(0.25 / (0.25 + 81.0), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_attention_heads": None},
            r"config\.json: field num_attention_heads: missing, but .*v_proj\.weight chang",
        ),
        ({"num_attention_heads": 7}, r"v_proj\.weight: 48 rows of v_proj do not fit 7 heads and the 96 columns of"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    base = whole_tensors()
    tuned = changed(base, {v_proj(1): low_rank(KV * HEAD, HIDDEN, [1.0], seed=4)})
    with pytest.raises(CheckpointError, match=message):
        build_bank(*written(tmp_path, base, tuned, **config))


def test_gemma_3_may_leave_out_how_many_heads_it_has(tmp_path: Path) -> None:
    """The published gemma-3-4b-it does, and means transformers' default."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**SIZES | {"num_attention_heads": 8, "head_dim": 4})
    model = transformers.Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight += low_rank(8, 32, [1.0], seed=1).float()
    model.save_pretrained(tmp_path / "tuned")
    for folder in (tmp_path / "base", tmp_path / "tuned"):
        written_config = json.loads((folder / "config.json").read_text())
        del written_config["num_attention_heads"]
        (folder / "config.json").write_text(json.dumps(written_config))
    # A delta of rank one in two key-value heads, each written by four of the eight.
    assert len(of_delta(build_bank(tmp_path / "base", tmp_path / "tuned"))[0].names) == 8


def test_factors_of_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", whole_tensors(), num_attention_heads=Q)
    adapter = write_adapter(tmp_path / "adapter", lora_factors(v_proj(0), KV * HEAD + 1, HIDDEN))
    with pytest.raises(
        CheckpointError, match=r"v_proj\.weight: B \[49, 4\] and A \[4, 64\], but the base has \[48, 64\]"
    ):
        build_adapter_bank(base, adapter)


def test_an_adapter_of_values_gives_the_bank_of_the_merged_model(tmp_path: Path) -> None:
    base = whole_tensors()
    factors = lora_factors(v_proj(0), KV * HEAD, HIDDEN, seed=1) | lora_factors(up_proj(1), INNER, HIDDEN, seed=2)
    deltas = {}
    for weight in (v_proj(0), up_proj(1)):
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        deltas[weight] = 2.0 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
    folders = written(tmp_path, base, changed(base, deltas))
    adapter = write_adapter(tmp_path / "adapter", factors)

    ours, reference = build_adapter_bank(folders[0], adapter), build_bank(*folders)

    assert ours.layers[0].names == tuple(f"L0.ov_proj.u{rank}" for rank in range(16))
    assert ours.layers[1].names == tuple(f"L1.down_up.u{rank}" for rank in range(4))
    for layer, other in zip(of_delta(ours), of_delta(reference), strict=True):
        assert layer.names == other.names
        assert worst_cosine(layer.directions, other.directions.double()) > 0.9999
        assert layer.singular_values == pytest.approx(other.singular_values, rel=1e-5)
    assert [part.share for part in ours.delta] == pytest.approx([part.share for part in reference.delta], rel=1e-5)


def test_an_adapter_of_a_fused_matrix_is_sliced(tmp_path: Path) -> None:
    model = made("Phi3ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    attention = decoder_layers(model)[1].self_attn
    name = "model.layers.1.self_attn.qkv_proj.weight"
    factors = lora_factors(name, *attention.qkv_proj.weight.shape, rank=1, seed=1)
    delta = 8.0 * (
        factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"].double()
        @ factors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"].double()
    )
    adapter = write_adapter(tmp_path / "adapter", factors, r=1, target_modules=["qkv_proj"])

    bank = build_adapter_bank(tmp_path / "base", adapter)

    size = attention.head_dim
    truth = by_heads(torch.ones(32), attention.o_proj.weight.detach(), delta[-KV * size :], size)
    (layer,) = of_delta(bank)
    assert layer.names == tuple(f"L1.ov_proj.u{rank}" for rank in range(4))
    assert 1.0 - worst_cosine(layer.directions, left_vectors(truth, 4)) < 1e-5
    energies = [delta[32:48].norm() ** 2, delta[:32].norm() ** 2, delta[48:].norm() ** 2]
    shares = {part.kind: part.share for part in bank.delta}
    assert shares["q_proj"] == pytest.approx(float(energies[1] / sum(energies)), rel=1e-6)
    assert shares["k_proj"] == pytest.approx(float(energies[0] / sum(energies)), rel=1e-6)
