"""How long the bank of a LoRA adapter takes, on a base in the shape of some layers of Llama 3 8B; all random.

python -m benchmarks.bank.adapter --layers 2 --rank 16
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from guard.directions import build_adapter_bank

HIDDEN, HEADS, GROUPS, INNER = 4096, 4096, 1024, 14336
SHAPES = {
    "self_attn.q_proj": (HEADS, HIDDEN),
    "self_attn.k_proj": (GROUPS, HIDDEN),
    "self_attn.v_proj": (GROUPS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write(folder: Path, layers: int, rank: int, generator: torch.Generator) -> tuple[Path, Path]:
    """A base in bfloat16 and an adapter on every linear layer in float32."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    weights, factors = {"model.embed_tokens.weight": torch.zeros(8, HIDDEN, dtype=torch.bfloat16)}, {}
    for layer in range(layers):
        for module, (rows, columns) in SHAPES.items():
            name = f"model.layers.{layer}.{module}"
            weights[f"{name}.weight"] = (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()
            factors[f"base_model.model.{name}.lora_A.weight"] = 0.02 * torch.randn(rank, columns, generator=generator)
            factors[f"base_model.model.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, rank, generator=generator)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN}
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    save_file(weights, base / "model.safetensors")
    targets = [module.split(".")[1] for module in SHAPES]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, adapter / "adapter_model.safetensors")
    return base, adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="undertow-") as folder:
        base, adapter = write(Path(folder), arguments.layers, arguments.rank, generator)
        start = time.perf_counter()
        bank = build_adapter_bank(base, adapter)
        seconds = time.perf_counter() - start
    count = sum(len(layer.names) for layer in bank.layers)
    print(f"layers       {arguments.layers}, rank {arguments.rank}, {torch.get_num_threads()} threads")
    print(f"directions   {count}")
    print(f"took         {seconds:.1f} s, {seconds / arguments.layers:.2f} s per layer")


if __name__ == "__main__":
    main()
