"""How much a truncated decomposition saves on one matrix, and how much of the delta it keeps.

python benchmarks/bank/build.py --rows 2048 --columns 5504 --k 20
"""

from __future__ import annotations

import argparse
import time

import torch

from guard.svd import truncated_svd


def decaying(rows: int, columns: int, decay: float, generator: torch.Generator) -> torch.Tensor:
    """A float32 matrix [rows, columns] with singular values i^-decay in random bases."""
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator)).Q
    values = torch.arange(1, side + 1, dtype=torch.float32) ** -decay
    return (left * values) @ right.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=5504)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--decay", type=float, default=0.5, help="singular values fall as i^-decay (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="of the truncated one; the best counts (default: 3)")
    arguments = parser.parse_args()

    matrix = decaying(arguments.rows, arguments.columns, arguments.decay, torch.Generator().manual_seed(arguments.seed))
    truncated_seconds = float("inf")
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        spectrum = truncated_svd(matrix.clone(), arguments.k, arguments.seed)
        truncated_seconds = min(truncated_seconds, time.perf_counter() - start)

    start = time.perf_counter()
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    full_seconds = time.perf_counter() - start

    best = float(values[: arguments.k].double().square().sum())
    found = float(spectrum.values.square().sum())
    cosines = (spectrum.vectors @ left[:, : arguments.k].double()).diagonal().abs()
    print(f"matrix            {arguments.rows} x {arguments.columns}, singular values i^-{arguments.decay}")
    print(f"truncated         {truncated_seconds:.2f} s (k {arguments.k})")
    print(f"full              {full_seconds:.2f} s (float32)")
    print(f"ratio             {full_seconds / truncated_seconds:.1f}")
    print(f"energy of best    {found / best:.6f} (of what the exact top {arguments.k} hold)")
    print(f"energy of delta   {spectrum.captured:.4f}")
    print(f"worst |cosine|    {float(cosines.min()):.6f}")


if __name__ == "__main__":
    main()
