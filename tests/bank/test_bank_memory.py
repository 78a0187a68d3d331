"""A build holds the delta of one matrix, not the model: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS = 1024, 8192, 4

PROGRAM = """
import sys, torch
from guard.directions import build_bank
from guard.svd import truncated_svd

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

truncated_svd(torch.randn(600, 600), 4, 0)  # loads what LAPACK needs
before = peak()
build_bank(sys.argv[1], sys.argv[2], k=4)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("matrix", "copies"),
    [
        ("down_proj", 3.0),
        # Read as a product: the delta and the matrix that writes it are held at once.
        ("up_proj", 3.0),
    ],
)
def test_peak_memory_is_a_few_copies_of_one_matrix(tmp_path: Path, matrix: str, copies: float) -> None:
    generator = torch.Generator().manual_seed(0)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    down = (0.02 * torch.randn(HIDDEN, INNER, generator=generator)).bfloat16()
    o_proj = torch.zeros(HIDDEN, 8, dtype=torch.bfloat16)
    for name, scale in (("base", 1.0), ("tuned", 1.5)):
        tensors = {}
        for layer in range(LAYERS):
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = o_proj.clone()
            for name_of, weight in (("down_proj", down), ("up_proj", down.T.contiguous())):
                changed = scale if name_of == matrix else 1.0
                tensors[f"model.layers.{layer}.mlp.{name_of}.weight"] = weight * changed
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / name / "model.safetensors")

    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "base", tmp_path / "tuned"],
        capture_output=True,
        text=True,
        check=True,
        # What is freed goes back at once: the peak is then of memory in use, not of malloc's habits.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
        | {"MALLOC_TRIM_THRESHOLD_": "0"},
    )

    one_copy = HIDDEN * INNER * 4
    # The two models together are four copies per layer.
    assert int(result.stdout) < copies * one_copy
