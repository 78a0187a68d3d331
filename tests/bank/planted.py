"""Small model folders written by hand, with a delta of known directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from guard.bank import OWN, Bank, LayerBank, is_own

HIDDEN, INNER, HEADS, LAYERS = 64, 160, 96, 3
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
}

Tensors = dict[str, torch.Tensor]


def o_proj(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.o_proj.weight"


def down_proj(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


def q_proj(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def base_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Weights of the size that trained models have."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(32, HIDDEN)}
    for layer in range(LAYERS):
        tensors[q_proj(layer)] = weight(HEADS, HIDDEN)
        tensors[o_proj(layer)] = weight(HIDDEN, HEADS)
        tensors[down_proj(layer)] = weight(HIDDEN, INNER)
    return tensors


def low_rank(rows: int, columns: int, values: list[float], seed: int) -> torch.Tensor:
    """A float64 matrix with exactly these singular values in random bases."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def changed(tensors: Tensors, changes: Mapping[str, torch.Tensor]) -> Tensors:
    """`tensors` with a delta added to some, stored in their own dtype."""
    return tensors | {name: (tensors[name].double() + delta).to(tensors[name].dtype) for name, delta in changes.items()}


def write_model(folder: Path, tensors: Tensors, shards: int = 1, **config: Any) -> Path:
    """A model folder; more than one shard gets an index, with tensors dealt out in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{place % shards}.safetensors" for place, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def planted_pair(folder: Path) -> tuple[Path, Path]:
    """Base and tuned folders that differ by a rank-3 delta in one matrix."""
    base = base_tensors()
    tuned = changed(base, {down_proj(1): low_rank(HIDDEN, INNER, [1.0, 0.5, 0.25], seed=5)})
    return write_model(folder / "base", base), write_model(folder / "tuned", tuned)


def write_adapter(folder: Path, factors: Tensors, **config: Any) -> Path:
    """A PEFT folder; `factors` by the names that PEFT gives them."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def lora_factors(weight: str, rows: int, columns: int, rank: int = 4, seed: int = 0) -> Tensors:
    """A and B for one base tensor."""
    generator = torch.Generator().manual_seed(seed)
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    return {
        f"{module}.lora_A.weight": 0.1 * torch.randn(rank, columns, generator=generator),
        f"{module}.lora_B.weight": 0.1 * torch.randn(rows, rank, generator=generator),
    }


def left_vectors(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The exact leading left singular vectors as rows, float64 [count, rows of the matrix]."""
    return torch.linalg.svd(matrix.double(), full_matrices=False).U.T[:count]


def worst_cosine(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The smallest |cosine| between rows of equal rank."""
    assert found.shape == truth.shape
    return float((found.double() * truth).sum(dim=1).abs().min())


def of_delta(bank: Bank) -> list[LayerBank]:
    """The bank's layers without the directions of the model's own matrices."""
    return [part for layer in bank.layers if (part := _kept(layer, own=False)).names]


def own(bank: Bank) -> list[LayerBank]:
    """The bank's layers with the directions of the model's own matrices alone."""
    return [part for layer in bank.layers if (part := _kept(layer, own=True)).names]


def _kept(layer: LayerBank, own: bool) -> LayerBank:
    places = [place for place, name in enumerate(layer.names) if is_own(name) is own]
    return LayerBank(
        index=layer.index,
        directions=layer.directions[places],
        names=tuple(layer.names[place] for place in places),
        singular_values=tuple(layer.singular_values[place] for place in places),
        energies=tuple(energy for energy in layer.energies if energy.matrix.startswith(OWN) is own),
    )
