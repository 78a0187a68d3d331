"""The op that reads the residual stream, one implementation per kind of device.

reference.py   plain torch: what the others are held against, and what a CPU runs
gpu.py         one Triton kernel
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from guard.engine.kernels import reference

Reader: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None
]
"""`reference.read`, or what does the same."""

FEW = 16
"""With fewer rows than this the work is cut in another way on a GPU: what costs then is reading the directions."""
WARM_UP = (3, FEW)
"""Numbers of rows that between them use every kernel there is, so that none is compiled in a request."""


def reader(device_type: str) -> Reader:
    """What reads the residual stream on devices of this type, such as `cpu` or `cuda`."""
    if device_type == "cuda":
        # Only here: Triton is no part of a CPU's environment.
        from guard.engine.kernels import gpu

        return gpu.read
    return reference.read
