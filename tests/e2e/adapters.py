"""LoRA adapters with known deltas, and the model that transformers makes of each by merging."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from guard.bank import Bank
from guard.calibration import Calibration, ScoreKey, Shape
from guard.engine.readings import Readings
from guard.growth import Growth
from guard.roles import RoleMap
from guard.scores import BankSpace, Moments
from guard.verdict import PHASES

TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
LOUDNESS = 0.1
"""Of a delta, as a share of the matrix that it is added to (Frobenius norms)."""


def write_adapter(folder: Path, base: Path, rank: int, alpha: float, seed: int) -> Path:
    """A PEFT folder whose delta of every target in every layer is random, of this rank."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith(TARGETS):
            continue
        left = torch.randn(weight.shape[0], rank, generator=generator)
        right = torch.randn(rank, weight.shape[1], generator=generator)
        scale = LOUDNESS * weight.float().norm() / ((left @ right).norm() * alpha / rank)
        factors[f"base_model.model.{module}.lora_B.weight"] = left * scale
        factors[f"base_model.model.{module}.lora_A.weight"] = right
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [t.split(".")[1] for t in TARGETS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none"}))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


class Merged:
    """The base with an adapter merged into its weights, or alone, read by transformers."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            self._merge(adapter)
        self._residuals: dict[int, torch.Tensor] = {}
        self._model.model.embed_tokens.register_forward_hook(self._keep(-1))
        for index, layer in enumerate(self._model.model.layers):
            layer.register_forward_hook(self._keep(index))

    def _merge(self, adapter: Path) -> None:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        factors = load_file(adapter / "adapter_model.safetensors")
        weights: Mapping[str, torch.Tensor] = dict(self._model.named_parameters())
        for name, left in factors.items():
            if name.endswith(".lora_B.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                right = factors[name.replace("lora_B", "lora_A")]
                delta = settings["lora_alpha"] / settings["r"] * (left.double() @ right.double())
                weights[f"{module}.weight"].data += delta.float()

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(_module: object, _arguments: object, output: Any) -> None:
            self._residuals[index] = output[0] if isinstance(output, torch.Tensor) else output[0][0]

        return hook

    def read(self, ids: Sequence[int], bank: Bank) -> Readings:
        """What a bank sees of every token, computed in float64."""
        with torch.no_grad():
            self._model(torch.tensor([ids]))
        cosines, written, lengths = [], [], []
        for layer in bank.layers:
            before, after = (self._residuals[index].double() for index in (layer.index - 1, layer.index))
            directions = layer.directions.double()
            length = after.norm(dim=-1, keepdim=True)
            cosines.append(after @ directions.T / length)
            written.append((after - before) @ directions.T)
            lengths.append(length)
        return Readings.whole(
            BankSpace.of(bank), *(torch.cat(each, dim=-1).float() for each in (cosines, written, lengths))
        )


def blocks_everything(bank: Bank, roles: RoleMap) -> Calibration:
    """A calibration whose clean requests all had scores below any that there are."""
    space = BankSpace.of(bank)
    size = space.size
    first, second = (Moments(60, torch.zeros(2 * size).double(), torch.eye(2 * size).double()) for _ in PHASES)
    keys: list[ScoreKey] = [(name, phase) for name in ("density", "intrinsic", "exceedance") for phase in PHASES]
    shape = Shape(torch.zeros(3, size), torch.zeros(3, size), (first, second), ())
    return Calibration(
        fingerprint=bank.fingerprint,
        space=space,
        shape=shape,
        clean={key: (-1.0,) * 99 for key in keys if key[0] in shape.detectors(space)},
        growth={key: Growth(1, 0.0) for key in keys if key[0] in shape.detectors(space)},
        roles=roles,
        target_fpr=0.05,
        facts={"dtype": "float32"},
    )
