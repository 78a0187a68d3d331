"""What is noted of a sequence in vLLM's process, and read in ours, which imports no worker."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(slots=True)
class Noted:
    """Of one sequence."""

    computed: dict[int, tuple[Array, Array, Array | None]] = field(default_factory=dict)
    """By position: cosines, lengths and, of a decision, features; the last time it was judged."""
    recalled: dict[int, float] = field(default_factory=dict)
    """By position: the exceedance that came from the cache."""
