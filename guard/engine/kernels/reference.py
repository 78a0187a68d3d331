"""The op in plain torch."""

from __future__ import annotations

import torch


def read(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    projections: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """hidden, residual [T, H]; directions float32 [K, H]. Of T rows, projections float32 [capacity, K] and lengths
    float32 [capacity] are written; count int64 [2] grows by one run and T rows."""
    rows = hidden.float() if residual is None else hidden.float() + residual.float()
    seen = len(rows)
    torch.mm(rows, directions.T, out=projections[:seen])
    torch.linalg.vector_norm(rows, dim=-1, out=lengths[:seen])
    count += torch.tensor([1, seen], device=count.device)
