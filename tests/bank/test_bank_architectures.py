"""Every supported class, as transformers itself writes it to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from guard.architectures import ARCHITECTURES
from guard.directions import build_bank
from guard.errors import UnsupportedModelError

from .planted import left_vectors, low_rank, of_delta, worst_cosine

HIDDEN, INNER, LAYERS = 32, 48, 2

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = SIZES | {"head_dim": 8}

CONFIGS: dict[str, Any] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**SIZES),
    "MistralForCausalLM": lambda: transformers.MistralConfig(**SIZES),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(**SIZES),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "Phi3ForCausalLM": lambda: transformers.Phi3Config(**SIZES),
    "Olmo2ForCausalLM": lambda: transformers.Olmo2Config(**SIZES),
    "Gemma2ForCausalLM": lambda: transformers.Gemma2Config(**GEMMA),
    "Gemma3ForCausalLM": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "Gemma3ForConditionalGeneration": lambda: transformers.Gemma3Config(
        text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4
    ),
}


def decoder_layers(model: Any) -> Any:
    inner = model.model
    return getattr(inner, "language_model", inner).layers


def test_every_supported_class_is_tried_here() -> None:
    assert CONFIGS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_delta_planted_through_transformers_is_found(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]())
    model.save_pretrained(tmp_path / "base")
    truth = {}
    with torch.no_grad():
        for matrix, module in (
            ("o_proj", decoder_layers(model)[0].self_attn.o_proj),
            ("down_proj", decoder_layers(model)[1].mlp.down_proj),
        ):
            delta = low_rank(*module.weight.shape, [1.0, 0.5], seed=len(truth))
            module.weight += delta
            truth[matrix] = left_vectors(delta, 2)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")

    bank = build_bank(tmp_path / "base", tmp_path / "tuned", k=20)

    assert (bank.model_class, bank.hidden_size, bank.num_layers) == (name, HIDDEN, LAYERS)
    assert [layer.names for layer in of_delta(bank)] == [
        ("L0.o_proj.u0", "L0.o_proj.u1"),
        ("L1.down_proj.u0", "L1.down_proj.u1"),
    ]
    for layer, vectors in zip(of_delta(bank), truth.values(), strict=True):
        assert worst_cosine(layer.directions, vectors) > 0.9999


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPT2LMHeadModel", lambda: transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)),
        ("MixtralForCausalLM", lambda: transformers.MixtralConfig(**SIZES, num_local_experts=2)),
    ],
)
def test_an_unsupported_class_is_named(tmp_path: Path, name: str, config: Any) -> None:
    getattr(transformers, name)(config()).save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match=f"{name} is not supported yet"):
        build_bank(tmp_path / "base", tmp_path / "tuned", k=20)
