"""A model of a given shape with random weights, and a "fine-tuned" one beside it: for timing, not for talking."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from guard.organisms import shipped

CHANGE_RANK = 32
"""Of the change to every matrix that writes to the residual stream."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """With one matrix for embeddings and logits."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * head * self.kv_heads
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden


SHAPES = {
    "tiny": Shape(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=256, vocabulary=4096),
    "0.4b": Shape(hidden=1024, layers=24, heads=16, kv_heads=8, intermediate=4096, vocabulary=32_000),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14_336, vocabulary=128_256),
}


def write_pair(shape: Shape, base: Path, tuned: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Write both models; the tuned one differs by low-rank changes of o_proj and down_proj."""
    source = torch.Generator().manual_seed(seed)
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}

    def add(name: str, rows: int, columns: int, change: bool = False) -> None:
        weight = torch.randn(rows, columns, generator=source) * (2 / (rows + columns)) ** 0.5
        first[name] = weight.to(dtype)
        if change:
            left = torch.randn(rows, CHANGE_RANK, generator=source)
            right = torch.randn(CHANGE_RANK, columns, generator=source)
            decay = torch.logspace(0, -1.5, CHANGE_RANK)
            weight = weight + 0.05 * weight.std() * (left * decay) @ right
        second[name] = weight.to(dtype)

    keys = shape.hidden // shape.heads * shape.kv_heads
    add("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        add(f"{prefix}self_attn.q_proj.weight", shape.hidden, shape.hidden)
        add(f"{prefix}self_attn.k_proj.weight", keys, shape.hidden)
        add(f"{prefix}self_attn.v_proj.weight", keys, shape.hidden)
        add(f"{prefix}self_attn.o_proj.weight", shape.hidden, shape.hidden, change=True)
        add(f"{prefix}mlp.gate_proj.weight", shape.intermediate, shape.hidden)
        add(f"{prefix}mlp.up_proj.weight", shape.intermediate, shape.hidden)
        add(f"{prefix}mlp.down_proj.weight", shape.hidden, shape.intermediate, change=True)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            first[f"{prefix}{norm}.weight"] = second[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
    first["model.norm.weight"] = second["model.norm.weight"] = torch.ones(shape.hidden, dtype=dtype)
    for folder, tensors in ((base, first), (tuned, second)):
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(_config(shape, dtype)))
        for name in TOKENIZER_FILES:
            if (file := shipped().backdoored / name).is_file():
                shutil.copy(file, folder / name)


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
